"""Tar files looked through where they lie: every offset right, odd and hostile files refused."""

import gzip
import hashlib
import io
import tarfile

import pytest

from alexnet_jax import archives
from alexnet_jax.errors import RunError
from experiments.official_tars import tar_bytes

LONG = 'a' * 120  # longer than a plain header holds


@pytest.fixture
def nested(tmp_path):
    """Two classes, odd sizes and names, a folder; and a plain file beside them."""
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


def test_every_file_is_found_where_it_lies(nested):
    path, classes = nested
    seen = []
    found = list(archives.entries(path, md5(path), seen.append))
    expected = [(outer, name, body) for outer, files in classes.items() for name, body in files]
    expected.append(('', 'folder/read.me', b'text'))
    assert [(entry.inside, entry.name) for entry in found] == [row[:2] for row in expected]
    for entry, (_, _, body) in zip(found, expected, strict=True):
        assert archives.read(path, entry.offset, entry.size) == body
        archives.read_soon(path, entry.offset, entry.size)
    assert seen[-1] == path.stat().st_size  # all of it went into the sum
    assert seen == sorted(seen)


@pytest.mark.parametrize('share', [0.3, 0.6, 0.9])
def test_a_partial_download_is_said_to_be_one(nested, share):
    path, _ = nested
    whole = md5(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(RunError, match=r'cannot be read to its end|md5'):
        list(archives.entries(path, whole))


def test_a_flipped_byte_is_noticed(nested):
    path, _ = nested
    whole = md5(path)
    content = bytearray(path.read_bytes())
    content[content.index(b'xxxx') + 3] ^= 1  # in the midst of a picture: all headers are sound
    path.write_bytes(content)
    assert len(list(archives.entries(path))) == 5
    with pytest.raises(RunError, match='is not the official file'):
        list(archives.entries(path, whole))


@pytest.mark.parametrize('name', ['../../etc/passwd', '/etc/passwd', 'a/../../b', 'n01/../x'])
def test_names_that_lead_out_are_refused(tmp_path, name):
    path = tmp_path / 'a.tar'
    path.write_bytes(tar_bytes([('fine', b''), (name, b'gotcha')]))
    with pytest.raises(RunError, match='leads out of its folder'):
        list(archives.entries(path))
    path.write_bytes(tar_bytes([('n01.tar', path.read_bytes())]))
    with pytest.raises(RunError, match='leads out of its folder'):
        list(archives.entries(path))


@pytest.mark.parametrize(
    'kind', [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]
)
def test_links_and_devices_are_refused(tmp_path, kind):
    with tarfile.open(tmp_path / 'a.tar', 'w') as tar:
        info = tarfile.TarInfo('n01_1.JPEG')
        info.type, info.linkname = kind, '/etc/passwd'
        tar.addfile(info)
    with pytest.raises(RunError, match='is no plain file'):
        list(archives.entries(tmp_path / 'a.tar'))


def test_what_is_no_tar_file(tmp_path):
    (tmp_path / 'a.tar').write_text('<html>please log in</html>' * 100)
    with pytest.raises(RunError, match='is no whole tar file'):
        list(archives.entries(tmp_path / 'a.tar'))


def test_gzipped_files_are_unpacked_but_not_without_end(tmp_path, monkeypatch):
    path = tmp_path / 'a'
    path.write_bytes(b'__' + gzip.compress(b'picture'))
    size = path.stat().st_size - 2
    assert archives.read(path, 2, size) == b'picture'
    with pytest.raises(RunError, match='has become shorter'):
        archives.read(path, 2, size + 1)
    monkeypatch.setattr(archives, 'MOST_BYTES', 1000)
    zeros = gzip.compress(bytes(10**6))
    assert archives.gunzipped(zeros) == zeros  # stopped; whoever decodes it finds no picture
    assert archives.gunzipped(zeros[:50]) == zeros[:50]
    assert archives.gunzipped(b'\x1f\x8bno') == b'\x1f\x8bno'
    with pytest.raises(RunError, match='can be no picture'):
        archives.read(path, 0, 1001)
