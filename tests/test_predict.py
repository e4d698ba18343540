"""Test classification of image files: the evaluation's bits, all kinds of files, damaged ones."""

import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from alexnet_jax.data import datasets, image_files
from alexnet_jax.errors import RunError, UsageError
from alexnet_jax.inference import evaluate, predict
from alexnet_jax.training import checkpoint

IMAGES = 40
GREY, RGB = (28, 28, 1), (32, 32, 3)


@pytest.fixture(scope='module')
def trained(smoke_run):
    return smoke_run


@pytest.fixture(scope='module')
def expected(trained):
    with np.load(trained / 'predictions_test.npz') as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope='module')
def images(data_dir):
    return datasets.load('fashion_mnist', data_dir, f'test[:{IMAGES}]').images


@pytest.fixture(scope='module')
def folder(images, tmp_path_factory):
    """Return a folder of the test images: 00.png, 01.png, ..."""
    path = tmp_path_factory.mktemp('test images')
    for i, image in enumerate(images):
        Image.fromarray(image[..., 0]).save(path / f'{i:02d}.png')
    return path


@pytest.fixture(scope='module')
def classify(trained):
    return predict.load(trained)


@pytest.fixture(scope='module')
def run_command(repository):
    def call(*words):
        return subprocess.run(
            [sys.executable, '-m', 'alexnet_jax', 'predict', *map(os.fspath, words)],
            cwd=repository,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return call


# ---------------------------------------------------------------- the evaluation's predictions


@pytest.mark.parametrize('views', ['centre', 'ten_views'])
def test_files_get_the_evaluations_probabilities(trained, expected, folder, views):
    classify = predict.load(trained, views=views)
    faults = []
    paths = image_files.find([str(folder)])
    (block,) = image_files.read_ahead(paths, classify.trained.stored, 100, faults)
    assert block[0] == sorted(folder.iterdir())
    assert not faults
    np.testing.assert_array_equal(classify(block[1]), expected[views])


def test_one_image_alone_gets_the_same_bits(classify, expected, folder):
    for i in (0, 17, IMAGES - 1):
        image = image_files.read(folder / f'{i:02d}.png', classify.trained.stored)
        np.testing.assert_array_equal(classify(image[None])[0], expected['centre'][i])


def test_any_number_of_images_compiled_once(classify, expected, images):
    for count in (0, 1, 16, 17, IMAGES):
        found = classify(images[:count])
        assert found.shape == (count, 10)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected['centre'][:count])
    trained = classify.trained
    assert evaluate.make_predict(trained.settings, trained.layout)._cache_size() == 1


def test_another_batch_size_differs_by_rounding_only(trained, expected, images):
    found = predict.load(trained, batch_size=8)(images)
    np.testing.assert_allclose(found, expected['centre'], rtol=1e-5)


def test_steps_by_number_and_best(trained, images):
    steps = checkpoint.steps(trained / 'checkpoints')
    last = predict.load(trained, step=steps[-1])
    assert last.trained.step == steps[-1]
    assert predict.load(trained, step='best').trained.step in steps
    with pytest.raises(UsageError, match='no checkpoint of step 3 '):
        predict.load(trained, step='3')


@pytest.mark.parametrize(
    ('mesh', 'devices'),
    [
        ({'data': 2, 'tower': 2}, 4),
        ({'data': 4, 'tower': 1, 'placement': 'one_weird_trick'}, 4),
        ({'data': 32, 'tower': 2}, 1),  # not available: one device is used
    ],
)
def test_the_training_mesh_is_used_if_possible(trained, expected, images, tmp_path, mesh, devices):
    saved = checkpoint.read(trained / 'checkpoints')
    saved.extra['config']['mesh'] |= mesh
    with checkpoint.Checkpoints(tmp_path / 'checkpoints') as checkpoints:
        checkpoints.save(saved.step, saved.state, saved.extra, error=None)
    classify = predict.load(tmp_path)
    here = devices if jax.device_count() >= devices else 1
    assert classify.trained.layout.mesh.size == here
    np.testing.assert_allclose(classify(images), expected['centre'], rtol=1e-5)
    extract = classify.trained.extractor('fc8_linear')  # on its own mesh
    np.testing.assert_allclose(jax.nn.softmax(extract(images)), expected['centre'], rtol=1e-5)


def test_arrays_of_another_size_are_resized_like_files(classify, tmp_path):
    rng = np.random.default_rng(0)
    for channels in (1, 3, 4):
        batch = rng.integers(0, 256, (2, 40, 60, channels), np.uint8)
        path = tmp_path / f'{channels}.png'
        Image.fromarray(batch[1].squeeze()).save(path)
        from_file = classify(image_files.read(path, GREY)[None])
        np.testing.assert_array_equal(classify(batch)[1], from_file[0])


@pytest.mark.parametrize(
    'wrong',
    [
        np.zeros((2, 28, 28, 1), np.float32),
        np.zeros((28, 28, 1), np.uint8),
        np.zeros((2, 28, 28, 2), np.uint8),
    ],
)
def test_arrays_that_are_no_images(classify, wrong):
    with pytest.raises(UsageError, match=r'uint8 \[B, H, W, C\]'):
        classify(wrong)


def test_what_load_refuses(trained, tmp_path):
    with pytest.raises(RunError, match='no checkpoint in'):
        predict.load(tmp_path / 'nothing')
    assert not (tmp_path / 'nothing').exists()


# ------------------------------------------------------------------------------ kinds of files


def photo(side=96, seed=0):
    """Return smooth colours without symmetry, uint8 [side, side, 3]."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
    return np.asarray(small.resize((side, side), Image.Resampling.BICUBIC))


def stored(path, shape=RGB):
    return image_files.read(path, shape).astype(int)


def test_images_of_the_stored_size_are_unchanged(tmp_path):
    rng = np.random.default_rng(0)
    for shape in (GREY, RGB):
        image = rng.integers(0, 256, shape, np.uint8)
        for name in ('a.png', 'a.webp', 'a.bmp', 'a.tif'):
            if (name, shape) == ('a.webp', GREY):
                continue  # WebP has no grey
            Image.fromarray(image.squeeze()).save(tmp_path / name, lossless=True)
            np.testing.assert_array_equal(image_files.read(tmp_path / name, shape), image)


@pytest.mark.parametrize(('width', 'height'), [(96, 64), (64, 96)])
def test_the_shorter_side_is_resized_and_the_centre_kept(tmp_path, width, height):
    picture = Image.fromarray(photo()).crop((0, 0, width, height))
    picture.save(tmp_path / 'a.png')
    full = np.asarray(picture.resize((width // 2, height // 2), Image.Resampling.BICUBIC))
    top, left = (full.shape[0] - 32) // 2, (full.shape[1] - 32) // 2
    np.testing.assert_array_equal(
        stored(tmp_path / 'a.png'), full[top : top + 32, left : left + 32]
    )


def test_resizing_is_antialiased(tmp_path):
    """A checkerboard of pixels becomes grey; sampling without antialiasing gives stripes."""
    board = (np.indices((320, 320)).sum(axis=0) % 2 * 255).astype(np.uint8)
    Image.fromarray(board).save(tmp_path / 'a.png')
    inner = stored(tmp_path / 'a.png')[2:-2, 2:-2]
    assert np.all(np.abs(inner - 127.5) <= 2)


def test_a_small_image_is_enlarged(tmp_path):
    Image.new('RGB', (3, 5), (10, 20, 30)).save(tmp_path / 'a.png')
    assert stored(tmp_path / 'a.png').reshape(-1, 3).tolist() == [[10, 20, 30]] * 32 * 32


@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    """A camera stores the sensor's rows and columns, and its orientation."""
    upright = photo(32)
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ('a.png', 'a.jpg', 'a.webp'):
        Image.fromarray(undo(upright)).save(
            tmp_path / name, exif=exif, lossless=True, quality=100, subsampling=0
        )
        off = 0 if name != 'a.jpg' else 6  # JPEG rounds
        assert np.max(np.abs(stored(tmp_path / name) - upright)) <= off, name


def test_alpha_is_composited_on_black(tmp_path):
    image = np.dstack([photo(32), np.zeros((32, 32), np.uint8)])
    image[:16, :, 3] = 255
    image[16:24, :, 3] = 128
    for name in ('a.png', 'a.webp'):
        Image.fromarray(image).save(tmp_path / name, lossless=True, exact=True)
        found = stored(tmp_path / name)
        np.testing.assert_array_equal(found[:16], image[:16, :, :3])
        assert np.max(np.abs(found[16:24] - image[16:24, :, :3] * (128 / 255))) <= 1
        assert found[24:].max() == 0
    grey = Image.fromarray(np.dstack([image[..., 0], image[..., 3]]))
    assert grey.mode == 'LA'
    grey.save(tmp_path / 'grey.png')
    found = stored(tmp_path / 'grey.png', (32, 32, 1))
    np.testing.assert_array_equal(found[:16, :, 0], image[:16, :, 0])
    assert found[24:].max() == 0


def test_palettes_with_and_without_transparency(tmp_path):
    colours = np.array([[200, 10, 10], [10, 200, 10], [250, 250, 250]], np.uint8)
    index = np.arange(32 * 32).reshape(32, 32) % 3
    picture = Image.fromarray(index.astype(np.uint8))
    picture.putpalette(colours.tobytes())
    assert picture.mode == 'P'
    picture.save(tmp_path / 'a.png')
    np.testing.assert_array_equal(stored(tmp_path / 'a.png'), colours[index])
    picture.save(tmp_path / 'b.png', transparency=2)
    colours[2] = 0
    np.testing.assert_array_equal(stored(tmp_path / 'b.png'), colours[index])


def test_colour_made_grey_and_grey_made_colour(tmp_path):
    Image.new('RGB', (40, 40), (200, 100, 50)).save(tmp_path / 'a.png')
    weights = 0.299 * 200 + 0.587 * 100 + 0.114 * 50  # ITU-R 601-2, as TFDS's grey sets have it
    assert np.all(np.abs(stored(tmp_path / 'a.png', GREY) - weights) <= 1)
    Image.new('L', (40, 40), 77).save(tmp_path / 'b.png')
    assert np.all(stored(tmp_path / 'b.png') == 77)
    Image.new('1', (40, 40), 1).save(tmp_path / 'c.png')
    assert np.all(stored(tmp_path / 'c.png') == 255)


@pytest.mark.parametrize('name', ['a.png', 'a.tif', 'a.pgm'])
def test_sixteen_bits_keep_their_upper_eight(tmp_path, name):
    values = (np.arange(32 * 32).reshape(32, 32) * 64).astype(np.uint16)  # all of 0..65472
    Image.fromarray(values).save(tmp_path / name)
    assert np.max(np.abs(stored(tmp_path / name, (32, 32, 1))[..., 0] - values / 256)) < 1


def test_cmyk_as_printers_write_it(tmp_path):
    Image.new('RGB', (40, 40), (200, 100, 50)).convert('CMYK').save(tmp_path / 'a.jpg', quality=100)
    with Image.open(tmp_path / 'a.jpg') as picture:
        assert picture.mode == 'CMYK'
    assert np.max(np.abs(stored(tmp_path / 'a.jpg') - [200, 100, 50])) <= 3  # JPEG rounds
    assert np.max(np.abs(stored(tmp_path / 'a.jpg', GREY) - 124)) <= 3


@pytest.mark.parametrize('name', ['a.gif', 'a.webp', 'a.png', 'a.tif'])
def test_the_first_of_several_frames_is_read(tmp_path, name):
    first, *others = (Image.new('RGB', (40, 40), colour) for colour in ('red', 'lime', 'blue'))
    first.save(tmp_path / name, save_all=True, append_images=others, lossless=True)
    assert stored(tmp_path / name).reshape(-1, 3).tolist() == [[255, 0, 0]] * 32 * 32


def test_files_that_are_no_image(tmp_path):
    Image.fromarray(photo()).save(tmp_path / 'full.png')
    body = (tmp_path / 'full.png').read_bytes()
    (tmp_path / 'cut.png').write_bytes(body[: len(body) // 2])
    flipped = bytearray(body)
    flipped[len(body) // 2] ^= 255
    (tmp_path / 'flipped.png').write_bytes(flipped)
    (tmp_path / 'text.jpg').write_text('no image')
    (tmp_path / 'empty.png').touch()
    Image.fromarray(np.ones((9, 9), np.float32)).save(tmp_path / 'float.tif')
    Image.fromarray(np.full((9, 9), 70_000, np.int32)).save(tmp_path / 'long.tif')
    (tmp_path / 'folder').mkdir()
    expected_text = {
        'cut.png': 'cannot be read as an image',
        'flipped.png': 'cannot be read as an image',
        'text.jpg': 'is not an image',
        'empty.png': 'is not an image',
        'float.tif': 'floating-point',
        'long.tif': 'more than 16 bits',
        'folder': 'Is a directory',
        'missing.png': 'No such file',
    }
    for name, words in expected_text.items():
        with pytest.raises(RunError, match=words) as caught:
            image_files.read(tmp_path / name, RGB)
        assert name in str(caught.value)
        assert '\n' not in str(caught.value)


def test_equally_probable_classes_are_ranked_by_number():
    probability = np.full(1000, 1e-3, np.float32)
    probability[700] = 0.1
    assert evaluate.top(probability, 5) == [700, 0, 1, 2, 3]
    assert evaluate.top(probability[:3], 5) == [0, 1, 2]


# --------------------------------------------------------------------------------- the command


def test_folders_globs_and_files(tmp_path):
    for name in ('b.png', 'a.png', 'sub/c.png', '.hidden.png', '.git/d.png', 'odd[1].png'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / 'none').mkdir()

    def found(*words):
        paths = image_files.find([str(tmp_path / word) for word in words])
        return [path.relative_to(tmp_path).as_posix() for path in paths]

    assert found('') == ['a.png', 'b.png', 'odd[1].png', 'sub/c.png']
    assert found('b.png', 'a.png', 'b.png', '?.png') == ['b.png', 'a.png']  # each once
    assert found('?.png') == ['a.png', 'b.png']
    assert found('**/c.png') == ['sub/c.png']
    assert found('s*') == ['sub/c.png']
    assert found('odd[1].png') == ['odd[1].png']
    assert found('x*', 'y.png', 'none') == ['x*', 'y.png', 'none']


def test_json_lines_and_bad_files_among_good_ones(run_command, trained, expected, folder, tmp_path):
    odd = os.fsdecode(os.fsencode(tmp_path) + b'/caf\xe9.png')
    shutil.copy(folder / '03.png', odd)
    (tmp_path / 'text.png').write_text('no image')
    done = run_command(
        '--json', f'--workdir={trained}', tmp_path / 'text.png', f'{folder}/0[12].png', odd,
        tmp_path / 'missing.png',
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert 'Traceback' not in done.stderr
    assert f'{tmp_path}/text.png is not an image' in done.stderr
    assert f'{tmp_path}/missing.png cannot be read as an image: No such file' in done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line['image'] for line in lines] == [f'{folder}/01.png', f'{folder}/02.png', odd]
    for line, row in zip(lines, expected['centre'][1:4], strict=True):
        order = sorted(range(10), key=lambda c: (-row[c], c))[:5]
        assert [entry['label'] for entry in line['top']] == order
        # Rounding: one device computes batches of 16, the run's eight devices computed 2 each.
        found = [entry['probability'] for entry in line['top']]
        np.testing.assert_allclose(found, row[order], rtol=1e-5)
        assert line['top'][0]['class'] in ('Ankle boot', 'Bag', 'Coat', 'Dress', 'Pullover',
                                           'Sandal', 'Shirt', 'Sneaker', 'T-shirt/top',
                                           'Trouser')  # fmt: skip


def test_a_table_over_ten_views(trained, expected, folder, capsys):
    words = [f'--workdir={trained}', '--views=10', '--top=2', f'{folder}/0[01].png']
    assert predict.main(words) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ['image', 'probability', 'class']
    assert len(out) == 2 + 2 * 2
    assert out[2].startswith(f'{folder}/00.png ')
    for line, row in ((out[2], 0), (out[4], 1)):
        assert f'{expected["ten_views"][row].max():.2%}' in line
    assert out[3].startswith(f'{folder}/00.png ')


@pytest.mark.parametrize(
    ('words', 'code', 'expected_text'),
    [
        (('--workdir={w}',), 2, 'required: IMAGE'),
        (('a.png',), 2, 'required: --workdir'),
        (('a.png', '--workdir={w}', '--views=3'), 2, 'choose from'),
        (('a.png', '--workdir={w}', '--top=0'), 2, '0 must be at least 1'),
        (('a.png', '--workdir={w}', '--batch_size=x'), 2, "invalid positive value: 'x'"),
        (('a.png', '--workdir={w}', '--step=soon'), 2, 'choose another of latest, best, '),
        (('a.png', '--workdir={w}/nothing'), 1, 'no checkpoint in'),
        (('nothing.png', '--workdir={w}'), 1, 'No such file'),
    ],
)
def test_error_messages(trained, capsys, words, code, expected_text):
    assert predict.main([word.replace('{w}', str(trained)) for word in words]) == code
    out, err = capsys.readouterr()
    assert out == ''  # not even a table's header
    assert expected_text in err.splitlines()[-1]


def test_a_closed_pipe(repository, trained, folder):
    """`... | true` ends without a traceback, with the exit code of a broken pipe."""
    line = f"{sys.executable} -m alexnet_jax predict --json --workdir='{trained}' '{folder}'"
    done = subprocess.run(
        ['bash', '-c', f'{line} | true; exit ${{PIPESTATUS[0]}}'],
        cwd=repository, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 141, done.stderr
    assert 'Traceback' not in done.stderr
    assert 'Exception ignored' not in done.stderr
