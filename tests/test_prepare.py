"""Test the command: its flags, its output, and one sentence for each failure."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from alexnet_jax.data import datasets, prepared
from alexnet_jax.data.prepare import command as prepare
from alexnet_jax.errors import RunError
from tests import sources

REPOSITORY = Path(__file__).parents[1]  # where `-m alexnet_jax prepare` is found


@pytest.fixture(scope='module')
def pets(tmp_path_factory):
    """Twenty pictures of two classes."""
    root, rng = tmp_path_factory.mktemp('source') / 'My pets', np.random.default_rng(0)
    for label in ('cat', 'dog'):
        (root / label).mkdir(parents=True)
        for i in range(10):
            image = Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8))
            (root / label / f'{i}.jpg').write_bytes(sources.jpeg(image))
    return root


def test_ones_own_pictures_from_folder_to_dataset(pets, tmp_path, capsys):
    words = ['folder', f'--source={pets}', f'--data_dir={tmp_path}', '--px=32', '--workers=1',
             '--storage=raw', '--validation=0.2', '--test=0']  # fmt: skip
    assert prepare.main(words) == 0
    folder = tmp_path / 'my_pets/1.0.0'
    assert capsys.readouterr().out.splitlines() == [str(folder)]
    dataset = datasets.load('my_pets', tmp_path, 'train')
    assert dataset.class_names == ('cat', 'dog')
    assert len(dataset) == 16
    assert dataset.images[np.arange(2)].shape == (2, 32, 32, 3)
    assert prepare.main(words) == 0  # it exists already


def test_the_command_starts_without_jax_and_tfds(pets, tmp_path):
    """Both take seconds to import; a worker imports TFDS's record format, and no JAX."""
    script = (
        'import sys; from alexnet_jax.data.prepare import command\n'
        'known = {name.partition(".")[0] for name in sys.modules}\n'
        'sys.exit(str(known & {"jax", "flax", "tensorflow_datasets", "tensorflow", "scipy"}))\n'
    )
    done = subprocess.run(
        [sys.executable, '-c', script], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.stderr.strip() == 'set()'


@pytest.mark.parametrize(
    ('words', 'code', 'sentence'),
    [
        ([], 2, 'DATASET'),
        (['fashion'], 2, "invalid choice: 'fashion'"),
        (['imagenet2012'], 2, 'required: --source'),
        (['imagenet2012', '--source={tmp}/none'], 2, 'is not a folder'),
        (['imagenet2012', '--source={tmp}'], 1, 'ILSVRC2012_img_train.tar is missing'),
        (['imagenet2010', '--source={tmp}'], 1, 'ILSVRC2010_images_train.tar is missing'),
        (['folder', '--source={tmp}/none'], 2, 'is not a folder'),
        (['folder', '--source={tmp}/empty'], 2, 'fewer than two classes'),
        (['folder', '--source={pets}', '--max_megapixels=0'], 2, '--max_megapixels must be'),
        (['folder', '--source=gs://bucket/x'], 2, 'gs://bucket/x is not a local path'),
        (['fashion_mnist', '--data_dir=s3://x/y'], 2, 's3://x/y is not a local path'),
        (['mnist', '--source={tmp}'], 1, 'train-images-idx3-ubyte.gz is missing'),
        (['folder', '--source={pets}', '--name=A b'], 2, '--name'),
        (['folder', '--source={pets}', '--storage=gif'], 2, "invalid choice: 'gif'"),
        (['folder', '--source={pets}', '--quality=101'], 2, '--quality must be from 1 to 100'),
        (['folder', '--source={pets}', '--px=0'], 2, '--px must be'),
        (['folder', '--source={pets}', '--workers=0'], 2, '--workers must be'),
        (['folder', '--source={pets}', '--skip_corrupt=-1'], 2, '--skip_corrupt must be'),
        (['folder', '--source={pets}', '--val=0.1'], 2, 'unrecognized arguments: --val=0.1'),
        (['folder', '--source={pets}', '--data_dir={file}/data'], 1, 'Not a directory'),
        (['folder', '--source={pets}', '--test=-0.1'], 2, '--test must be from 0 to 1'),
        (
            ['folder', '--source={pets}', '--test=0.5', '--validation=0.5'],
            2,
            "no images of class 'cat' to train on",
        ),
    ],
)
def test_it_ends_badly_in_one_sentence(words, code, sentence, pets, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / 'file'
    file.touch()
    (tmp_path / 'empty').mkdir()
    given = [word.format(file=file, tmp=tmp_path, pets=pets) for word in words]
    assert prepare.main(given) == code
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith('prepare: ')] == lines[-1:]
    assert sentence in lines[-1]


def test_the_home_directory_is_expanded(pets, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path / 'pets').symlink_to(pets)
    words = ['folder', '--source=~/pets', '--data_dir=~/data', '--px=8', '--workers=1']
    assert prepare.main(words) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / 'data/my_pets/1.0.0')


def test_the_error_of_a_damaged_set_names_the_command(pets, tmp_path):
    words = ['folder', f'--source={pets}', f'--data_dir={tmp_path}', '--px=16', '--workers=1']
    assert prepare.main(words) == 0
    folder = tmp_path / 'my_pets/1.0.0'
    next(folder.glob('*train*')).unlink()
    with pytest.raises(RunError, match=r'`python -m alexnet_jax prepare folder --name=my_pets '):
        prepared.describe(folder)
    (tmp_path / 'imagenet2012/1.0.0').mkdir(parents=True)
    with pytest.raises(RunError, match=r'alexnet_jax prepare imagenet2012 --source=FOLDER'):
        prepared.describe(tmp_path / 'imagenet2012/1.0.0')


# ---- sets of TFDS --------------------------------------------------------------------------


def by_tfds(data_dir, file_format='array_record', name='shapes', **more):
    """A data set made by TFDS's own code, images of different sizes."""
    features = {'image': tfds.features.Image(), 'label': tfds.features.ClassLabel(names=['a', 'b'])}
    features |= more

    class Shapes(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version('2.1.0')

        def _info(self):
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {'train': self._generate_examples()}

        def _generate_examples(self):
            import io

            for i in range(6):
                buffer = io.BytesIO()
                Image.new('RGB', (20 + i, 30), (i, 0, 0)).save(buffer, 'png')
                buffer.seek(0)
                yield i, {'image': buffer, 'label': i % 2, **dict.fromkeys(more, 'x')}

    Shapes.name = name
    Shapes.pkg_dir_path = data_dir
    tfds.disable_progress_bar()
    builder = Shapes(data_dir=data_dir, file_format=file_format)
    builder.download_and_prepare()
    return Path(builder.data_dir)


@pytest.fixture(scope='module')
def tfds_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tfds')
    by_tfds(folder)
    return folder


def test_a_set_prepared_by_tfds_is_read_without_preparation(tfds_dir):
    dataset = datasets.load('shapes', tfds_dir, 'train')
    assert dataset.images.shape == (6, 256, 256, 3)
    assert dataset.class_names == ('a', 'b')


def test_the_newest_version_and_a_config(tfds_dir, tmp_path):
    for place in (
        'shapes/10.0.0', 'shapes/small/3.0.0', 'shapes/9.9.9', 'shapes/incomplete.A1_11.0.0',
    ):  # fmt: skip
        shutil.copytree(tfds_dir / 'shapes/2.1.0', tmp_path / place)
    for name, version in (('shapes', '10.0.0'), ('shapes/small', '3.0.0')):
        (path, count), *_ = datasets.describe(name, tmp_path).files['train']
        assert path.parent == tmp_path / name / version
        assert count == 6


def test_a_set_without_labelled_images_is_refused(tmp_path):
    folder = by_tfds(tmp_path)
    features = json.loads((folder / 'features.json').read_text())
    del features['featuresDict']['features']['label']
    (folder / 'features.json').write_text(json.dumps(features))
    with pytest.raises(RunError, match=r'its description .*KeyError: .label'):
        datasets.describe('shapes', tmp_path)


def test_another_format_is_refused(tfds_dir, tmp_path):
    shutil.copytree(tfds_dir / 'shapes', tmp_path / 'shapes')
    for path in tmp_path.glob('shapes/*/*array_record*'):
        path.rename(path.with_name(path.name.replace('array_record', 'tfrecord')))
    with pytest.raises(RunError, match=r'array_record-00000-of-00001.*tfds build NAME --file_form'):
        datasets.describe('shapes', tmp_path)
