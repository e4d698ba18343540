"""Test listings of tar files and folders: offsets, incomplete and damaged archives, leftovers."""

import gzip
import hashlib
import io
import tarfile
from pathlib import Path

import pytest

from alexnet_jax.data.prepare import imagenet
from alexnet_jax.data.prepare.image_folder import folder_files
from alexnet_jax.data.prepare.shards import File
from alexnet_jax.errors import RunError
from tests.sources import tar_bytes

LONG = 'a' * 120  # longer than a plain header holds


@pytest.fixture
def nested(tmp_path):
    """Two classes, odd sizes and names, a folder; and a plain file next to them."""
    classes = {
        'n01.tar': [('n01_1.JPEG', b'one'), ('n01_2.JPEG', b'x' * 5000), (f'n01_{LONG}', b'')],
        'n02.tar': [('n02_é.JPEG', b'y' * 513)],
    }
    path = tmp_path / 'train.tar'
    with tarfile.open(path, 'w') as tar:
        for name, files in classes.items():
            content = tar_bytes(files)
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        folder = tarfile.TarInfo('folder')
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        info = tarfile.TarInfo('folder/read.me')
        info.size = 4
        tar.addfile(info, io.BytesIO(b'text'))
    return path, classes


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def test_every_file_is_found(nested):
    path, classes = nested
    found = list(imagenet.tar_files(path, md5(path)))
    expected = [file for files in classes.values() for file in files] + [('read.me', b'text')]
    assert [file.name for file in found] == [name for name, _ in expected]
    for file, (_, body) in zip(found, expected, strict=True):
        assert file.read() == body


def test_leftovers_of_systems_are_ignored(tmp_path):
    for name in ('n01/b', 'n01/a', 'c', '.hidden', '@eaDir/a', 'n01/@eaDir/a/x.jpg', 'Thumbs.db',
                 '__MACOSX/._a', 'lost+found/1', 'n01/.ipynb_checkpoints/a', 'n01/.DS_Store',
                 '$RECYCLE.BIN/1.jpg', 'n01/desktop.ini'):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / 'n02').symlink_to(tmp_path / 'n01')
    found = list(folder_files(tmp_path))
    names = ['c', 'n01/a', 'n01/b', 'n02/a', 'n02/b']
    assert [str(Path(file.path).relative_to(tmp_path)) for file in found] == names
    assert found[1].read() == b'n01/a'


@pytest.mark.parametrize('share', [0.3, 0.6, 0.9])
def test_a_partial_download_is_refused(nested, share):
    path, _ = nested
    full = md5(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(RunError, match=r'is incomplete \('):
        list(imagenet.tar_files(path, full))


def test_a_flipped_byte_is_noticed(nested):
    path, _ = nested
    full = md5(path)
    content = bytearray(path.read_bytes())
    content[content.index(b'xxxx') + 3] ^= 1  # inside a picture: all headers are intact
    path.write_bytes(content)
    assert len(list(imagenet.tar_files(path))) == 5
    with pytest.raises(RunError, match=r'not the official tar file .*md5'):
        list(imagenet.tar_files(path, full))


def test_links_and_devices_are_ignored(tmp_path):
    with tarfile.open(tmp_path / 'a.tar', 'w') as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            info = tarfile.TarInfo('n01_1.JPEG')
            info.type, info.linkname = kind, '/etc/passwd'
            tar.addfile(info)
    assert not list(imagenet.tar_files(tmp_path / 'a.tar'))


def test_a_file_that_is_not_a_tar(tmp_path):
    (tmp_path / 'a.tar').write_text('<html>please log in</html>' * 100)
    with pytest.raises(RunError, match='is not the official tar file'):
        list(imagenet.tar_files(tmp_path / 'a.tar'))


def test_gzipped_files_are_unpacked(tmp_path):
    path, zipped = tmp_path / 'a', gzip.compress(b'picture')
    for content, expected in ((zipped, b'picture'), (zipped[:-9], None), (b'\x1f\x8bno', None)):
        path.write_bytes(b'__' + content)
        # What cannot be unpacked is left to the decoder of images, which then finds none.
        file = File('a', str(path), 2, len(content))
        assert file.read() == (expected or content)
