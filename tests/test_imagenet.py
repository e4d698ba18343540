"""Test small official archives and extracted folders: labels from names, counts checked."""

import dataclasses
import gzip
import hashlib
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from alexnet_jax.data.prepare import imagenet, shards
from alexnet_jax.data.prepare.imagenet import ILSVRC_2010, ILSVRC_2012
from alexnet_jax.errors import RunError
from experiments.data_bench import process
from tests.sources import jpeg, tar_bytes, write_devkit
from tests.test_shard_writer import InThisProcess

WNIDS = ('n03', 'n01', 'n02')  # by the kit's numbers 1, 2, 3; sorted they are labels 2, 0, 1
TRAIN = {'n01': 2, 'n02': 1, 'n03': 3}
VALIDATION = (3, 1, 1, 2)  # the kit's numbers of picture 1, 2, 3, 4
TEST = (2, 2, 3)


def content(name):
    """A picture of a colour of its own."""
    colour = tuple(np.random.default_rng(list(name.encode())).integers(0, 256, 3).tolist())
    return jpeg(Image.new('RGB', (9, 7), colour))


def write_tar(path, named):
    path.write_bytes(tar_bytes(named))


def train(wnids=TRAIN, count=TRAIN):
    return [
        (f'{w}.tar', tar_bytes((f'{w}_{i}.JPEG', content(f'{w}_{i}')) for i in range(count[w])))
        for w in wnids
    ]


def numbered(year, part, numbers, prefix=''):
    names = (f'ILSVRC{year}_{part}_{i:08d}.JPEG' for i in numbers)
    return [(prefix + name, content(name)) for name in names]


def synsets():
    return [(wnid, f'{wnid}, words', TRAIN[wnid]) for wnid in WNIDS]


def small(challenge):
    """`challenge` with three classes; no archive has a known sum."""
    counts = {'train': 6, 'validation': 4, 'test': 3}
    parts = {
        split: dataclasses.replace(archive, images=counts[split], size=None, md5=None)
        for split, archive in challenge.archives.items()
    }
    return dataclasses.replace(challenge, archives=parts, classes=3)


SMALL_2012, SMALL_2010 = small(ILSVRC_2012), small(ILSVRC_2010)


@pytest.fixture
def year_2012(tmp_path):
    write_tar(tmp_path / 'ILSVRC2012_img_train.tar', train())
    write_tar(tmp_path / 'ILSVRC2012_img_val.tar', numbered(2012, 'val', (4, 2, 1, 3)))
    truths = {'ILSVRC2012_validation_ground_truth.txt': list(VALIDATION)}
    write_devkit(tmp_path / 'ILSVRC2012_devkit_t12.tar.gz', 2012, synsets(), truths)
    return tmp_path


@pytest.fixture
def year_2010(tmp_path):
    write_tar(tmp_path / 'ILSVRC2010_images_train.tar', train(count=TRAIN))
    val = numbered(2010, 'val', (2, 1, 4, 3), 'val/')
    write_tar(tmp_path / 'ILSVRC2010_images_val.tar', val)
    write_tar(tmp_path / 'ILSVRC2010_images_test.tar', numbered(2010, 'test', (3, 1, 2), 'test/'))
    truths = {'ILSVRC2010_validation_ground_truth.txt': list(VALIDATION)}
    write_devkit(tmp_path / 'ILSVRC2010_devkit-1.0.tar.gz', 2010, synsets(), truths)
    lines = ''.join(f'{number}\n' for number in TEST)
    (tmp_path / 'ILSVRC2010_test_ground_truth.txt').write_text(lines)
    return tmp_path


def listed(challenge, folder):
    """{(split, name): (label, contents)} of all pictures."""
    source = imagenet.source(challenge, folder)
    return {(split, file.name): (label, file.read()) for split, label, file in source.pictures()}


LABEL = {3: 1, 1: 2, 2: 0}  # of the kit's numbers, by hand


def expected(year, splits):
    found = {}
    for label, wnid in enumerate(('n01', 'n02', 'n03')):
        for i in range(TRAIN[wnid]):
            found['train', f'{wnid}_{i}.JPEG'] = label, content(f'{wnid}_{i}')
    for split, part, truth in splits:
        for i, number in enumerate(truth, start=1):
            name = f'ILSVRC{year}_{part}_{i:08d}.JPEG'
            found[split, name] = LABEL[number], content(name)
    return found


def test_2012(year_2012):
    assert listed(SMALL_2012, year_2012) == expected(2012, [('validation', 'val', VALIDATION)])
    source = imagenet.source(SMALL_2012, year_2012)
    assert source.name == 'imagenet2012'
    assert source.class_names == ('n01', 'n02', 'n03')
    assert source.words == ('n01, words', 'n02, words', 'n03, words')


def test_2010_with_its_corrections_and_a_gzipped_picture(year_2010, capsys):
    splits = [('validation', 'val', VALIDATION), ('test', 'test', TEST)]
    known = expected(2010, splits)
    assert listed(SMALL_2010, year_2010) == known
    assert 'patch_images.tar is missing' in capsys.readouterr().err

    patched, zipped = ('validation', 'ILSVRC2010_val_00000002.JPEG'), ('train', 'n03_1.JPEG')
    write_tar(year_2010 / 'patch_images.tar', [(f'patch_images/val/{patched[1]}', b'mended')])
    classes = train()
    classes[2] = (
        'n03.tar',
        tar_bytes(
            (f'n03_{i}.JPEG', gzip.compress(content(f'n03_{i}')) if i == 1 else content(f'n03_{i}'))
            for i in range(3)
        ),
    )
    write_tar(year_2010 / 'ILSVRC2010_images_train.tar', classes)
    assert known[zipped][1] == content('n03_1')
    assert listed(SMALL_2010, year_2010) == known | {patched: (known[patched][0], b'mended')}


def test_the_real_lists_of_tfds():
    """Without a development kit; facts that hold for the real ILSVRC-2012."""
    classes = imagenet.tfds_lists()
    assert len(classes.wnids) == 1000
    assert list(classes.wnids) == sorted(classes.wnids)
    assert (classes.wnids[0], classes.wnids[281]) == ('n01440764', 'n02123045')  # tench, tabby
    truth = np.bincount(classes.truths['validation'], minlength=1000)
    assert (truth == 50).all()
    # ILSVRC2012_val_00000001.JPEG is a sea snake, n01751748, in all published lists.
    assert classes.wnids[classes.truths['validation'][0]] == 'n01751748'


def test_without_a_devkit_2012_uses_the_lists_of_tfds(year_2012):
    (year_2012 / 'ILSVRC2012_devkit_t12.tar.gz').unlink()
    source = imagenet.source(SMALL_2012, year_2012)
    assert len(source.class_names) == 1000
    assert source.words == ()
    with pytest.raises(RunError, match='download or extract it again'):
        list(source.pictures())


# ---- incomplete sources ----------------------------------------------------------------------


def refused(challenge, folder, message):
    with pytest.raises(RunError, match=message) as caught:
        list(imagenet.source(challenge, folder).pictures())
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    ('numbers', 'message'),
    [
        ((4, 2, 1), '3 of 4 images: download or extract'),
        ((4, 2, 2, 1), '3 of 4'),
        ((4, 2, 1, 5), '3 of 4'),
        ((0, 1, 2, 3), '3 of 4'),
        ((), '0 of 4'),
    ],
)
@pytest.mark.parametrize('extracted', [False, True])
def test_validation_pictures_that_do_not_match(year_2012, numbers, message, extracted):
    pictures = numbered(2012, 'val', numbers)
    if extracted:
        (year_2012 / 'ILSVRC2012_img_val.tar').unlink()
        for i, (name, content) in enumerate(pictures):
            (year_2012 / f'val/{i}').mkdir(parents=True)
            (year_2012 / f'val/{i}/{name}').write_bytes(content)
        (year_2012 / 'val').mkdir(exist_ok=True)
    else:
        write_tar(year_2012 / 'ILSVRC2012_img_val.tar', pictures)
    refused(SMALL_2012, year_2012, message)


@pytest.mark.parametrize(
    ('classes', 'message'),
    [
        (train(wnids=('n01', 'n03')), '5 of 6 images'),
        (train(count=TRAIN | {'n03': 2}), '5 of 6 images'),
        ([('n04.tar', tar_bytes([('n04_1.JPEG', b'')]))], '0 of 6 images'),
        ([('n01_1.txt', b'')], '0 of 6 images'),
    ],
)
def test_training_pictures_that_do_not_match(year_2012, classes, message):
    write_tar(year_2012 / 'ILSVRC2012_img_train.tar', classes)
    refused(SMALL_2012, year_2012, message)


# ---- extracted ------------------------------------------------------------------------------


# Python 3.11.2, which is Debian's, has no filters; 3.12 warns where none is named.
SAFELY = {'filter': 'data'} if hasattr(tarfile, 'data_filter') else {}


def extract(folder, place, val_by_class=False):
    """Unpack the tar files of a year as people do, and remove them."""
    with tarfile.open(folder / 'ILSVRC2012_img_train.tar') as tar:
        for one in tar:
            target = folder / place / 'train' / one.name[:-4]
            with tarfile.open(fileobj=tar.extractfile(one)) as inner:
                inner.extractall(target, **SAFELY)
    with tarfile.open(folder / 'ILSVRC2012_img_val.tar') as tar:
        tar.extractall(folder / place / 'val', **SAFELY)
    if val_by_class:
        for path in list((folder / place / 'val').iterdir()):
            label = LABEL[VALIDATION[int(path.stem[-8:]) - 1]]
            inside = path.parent / sorted(WNIDS)[label]
            inside.mkdir(exist_ok=True)
            path.rename(inside / path.name)
    (folder / place / 'val/.DS_Store').write_text('')
    (folder / place / 'train/n01/@eaDir').mkdir()
    (folder / place / 'train/n01/@eaDir/n01_7.JPEG').write_text('')
    for path in folder.glob('*.tar'):
        path.unlink()


@pytest.mark.parametrize('place', ['', 'ILSVRC/Data/CLS-LOC'])
@pytest.mark.parametrize('val_by_class', [False, True])
def test_extracted_folders_give_the_same_pictures(year_2012, place, val_by_class):
    extract(year_2012, place, val_by_class)
    assert listed(SMALL_2012, year_2012) == expected(2012, [('validation', 'val', VALIDATION)])


def test_prepared_from_folders_or_from_archives_the_bytes_are_the_same(year_2012, tmp_path):
    folders = []
    for name in ('archives', 'folders'):
        source = imagenet.source(SMALL_2012, year_2012)
        folder = shards.make(source, tmp_path / f'data_{name}', shards.Form(32), workers=1)
        folders.append({path.name: path.read_bytes() for path in folder.iterdir()})
        if name == 'archives':
            extract(year_2012, 'Data/CLS-LOC')
    assert folders[0] == folders[1]


def test_a_picture_that_is_mended_in_place_is_read_again(year_2012, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, 'ProcessPoolExecutor', InThisProcess)
    extract(year_2012, '')
    path = year_2012 / 'train/n03/n03_2.JPEG'
    content = path.read_bytes()
    path.write_bytes(content[:100])

    def prepare():
        source = imagenet.source(SMALL_2012, year_2012)
        return shards.make(source, tmp_path / 'data', shards.Form(32), workers=1)

    with pytest.raises(RunError, match=r'n03_2.JPEG cannot be read'):
        prepare()
    path.write_bytes(content)
    assert prepare().is_dir()


def test_a_list_of_tar_files_is_used_again(year_2012, tmp_path, monkeypatch):
    """Reading ImageNet's 138 GB a second time would take as long as the rest."""
    monkeypatch.setattr(shards, 'ProcessPoolExecutor', InThisProcess)
    monkeypatch.setattr(shards, '_describe', lambda *_: 1 / 0)
    for _ in range(2):
        source = imagenet.source(SMALL_2012, year_2012)
        with pytest.raises(ZeroDivisionError):
            shards.make(source, tmp_path / 'data', shards.Form(32), workers=1)
        monkeypatch.setattr(imagenet, 'tar_files', None)


def test_a_training_picture_that_is_missing(year_2012):
    extract(year_2012, '')
    (year_2012 / 'train/n03/n03_2.JPEG').unlink()
    refused(SMALL_2012, year_2012, '5 of 6 images')


# ---- the official files ---------------------------------------------------------------------


def test_the_real_challenge_wants_the_real_files(year_2012):
    with pytest.raises(RunError, match=r'has [\d,]+ of 147,897,477,120 bytes: resume or repeat'):
        imagenet.source(ILSVRC_2012, year_2012)
    with pytest.raises(RunError, match=r'ILSVRC2010_images_train.tar is missing'):
        imagenet.source(ILSVRC_2010, year_2012)


def test_another_md5_is_refused(year_2012):
    def with_its_md5(archive):
        md5 = hashlib.md5((year_2012 / archive.name).read_bytes()).hexdigest()
        return dataclasses.replace(archive, md5=md5)

    parts = {split: with_its_md5(archive) for split, archive in SMALL_2012.archives.items()}
    built = dataclasses.replace(SMALL_2012, archives=parts)
    assert len(list(imagenet.source(built, year_2012).pictures())) == 10
    path = year_2012 / 'ILSVRC2012_img_val.tar'
    path.write_bytes(path.read_bytes()[:-1] + b'\1')  # the padding: no picture differs
    refused(built, year_2012, r'is not the official tar file .*its md5 is not')


def damaged_kit(folder, synsets=None, truth=VALIDATION, **options):
    kit = folder / 'ILSVRC2012_devkit_t12.tar.gz'
    truths = {'ILSVRC2012_validation_ground_truth.txt': list(truth)}
    write_devkit(kit, 2012, synsets or globals()['synsets'](), truths)
    return kit


def test_wrong_development_kits_are_refused(year_2012):
    def message():
        with pytest.raises(RunError, match='not the official file') as caught:
            imagenet.source(SMALL_2012, year_2012)
        return str(caught.value)

    damaged_kit(year_2012, truth=(3, 1, 1, 9))
    assert 'KeyError: 9' in message()
    damaged_kit(year_2012, synsets=synsets()[:2])
    assert 'KeyError: 3' in message()
    kit = damaged_kit(year_2012)
    kit.write_bytes(kit.read_bytes()[:300])
    assert 'EOFError' in message()
    kit.write_text('<html>')
    assert 'ReadError' in message()


def test_a_short_list_of_labels_is_noticed(year_2012):
    damaged_kit(year_2012, truth=(3, 1, 1))
    refused(SMALL_2012, year_2012, '3 of 4 images')


def test_a_missing_truth_is_named(year_2010):
    (year_2010 / 'ILSVRC2010_test_ground_truth.txt').unlink()
    with pytest.raises(
        RunError, match=r'is missing, incomplete .*KeyError: .ILSVRC2010_test_ground_truth.txt'
    ):
        imagenet.source(SMALL_2010, year_2010)
    (year_2010 / 'ILSVRC2010_devkit-1.0.tar.gz').unlink()
    with pytest.raises(RunError, match=r'devkit-1.0.tar.gz is missing, .*No such file'):
        imagenet.source(SMALL_2010, year_2010)


def test_a_command_is_measured(tmp_path):
    log = tmp_path / 'log'
    # Memory is read every 50 ms, so the process lives for longer.
    row = process.run(['-c', 'import time; print(1); time.sleep(0.5)'], log)
    assert log.read_text() == '1\n'
    assert row['main_process_mib'] > 0
    assert row['secs'] > 0.5
    assert 0 < row['cpu_secs'] < row['secs']
    asleep = ['-c', 'import time; print("begins", flush=True); time.sleep(60)']
    assert process.run(asleep, log, until=lambda: 'begins' in log.read_text())['secs'] < 60
    with pytest.raises(RunError, match='exit code 1; see'):
        process.run(['-c', '1 / 0'], log)


def test_no_command_outlives_a_ctrl_c(tmp_path, monkeypatch):
    log = tmp_path / 'log'

    def stop(pid):
        if log.read_text():
            raise KeyboardInterrupt
        return []

    monkeypatch.setattr(process, '_children', stop)
    asleep = ['-c', 'import os, time; print(os.getpid(), flush=True); time.sleep(60)']
    with pytest.raises(KeyboardInterrupt):
        process.run(asleep, log)
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)
