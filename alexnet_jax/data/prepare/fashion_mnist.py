"""Prepare MNIST and Fashion-MNIST from the first source that has their four raw files.

The bytes written depend on the images alone: TFDS's own writer serialises records in an order that
varies with the process. Order, features and description are those of TFDS's builders.
"""

import contextlib
import gzip
import hashlib
import io
import shutil
import subprocess
import tempfile
import urllib.request
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from alexnet_jax.command import log
from alexnet_jax.data import prepared
from alexnet_jax.data.prepare import shards
from alexnet_jax.errors import RunError

Raw = dict[str, tuple[np.ndarray, np.ndarray]]  # {split: (uint8 [N, H, W], uint8 [N])}


# In the IDX format.
FILES = ('train-images-idx3-ubyte.gz', 'train-labels-idx1-ubyte.gz',
         't10k-images-idx3-ubyte.gz', 't10k-labels-idx1-ubyte.gz')  # fmt: skip
# Their sha256 when they are unpacked: gzip headers differ from copy to copy.
SUMS = {
    # With upstream's file name and time (31 August 2017) put back into their gzip headers, the
    # files of Debian's package have the sums that TFDS 4.9.10 lists (url_checksums/fashion_mnist).
    'fashion_mnist': (
        'c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888',
        'bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9',
        '5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b',
        '0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34',
    ),
    # Files at storage.googleapis.com/cvdf-datasets/mnist; many public repositories list these sums.
    'mnist': (
        'ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db',
        '65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5',
        '0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7',
        'ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2',
    ),
}
VERSION = '3.0.1'  # of TFDS's builders
DEBIAN_PACKAGE = 'dataset-fashion-mnist'
DEBIAN_FOLDER = Path('/usr/share/datasets/fashion-mnist')


def ensure(name: str, data_dir: str | Path) -> None:
    """Prepare data set `name` if it can be downloaded and no version of it exists."""
    if name in prepared.FETCHED and not any(Path(data_dir, name).glob('*/dataset_info.json')):
        prepare(data_dir, name=name)


def prepare(
    data_dir: str | Path, source: Path | None = None, *, name: str = 'fashion_mnist'
) -> Path:
    """Prepare a data set in `data_dir` and return the builder's folder, at once if it exists.

    Args:
        data_dir: the folder of all data sets.
        source: a folder with the four files. If it is None: of Fashion-MNIST, Debian's package,
            installed or fetched by `apt-get download`, which needs no root; else TFDS's address.
        name: 'fashion_mnist', or 'mnist' for the digits.

    Raises:
        RunError: no source has all files.
        OSError: `data_dir` cannot be written.
    """
    data_dir = Path(data_dir)
    folder = data_dir / name / VERSION
    if folder.exists():
        return folder
    with (
        shards.locked_staging_dir(data_dir, name) as staging,
        tempfile.TemporaryDirectory(dir=staging) as scratch,
    ):
        if not folder.exists():  # else another process made it while this one waited
            raw = read_raw(source, name) if source else _fetch(name, data_dir, Path(scratch))
            written = write(raw, Path(scratch), name)
            folder.parent.mkdir(exist_ok=True)
            written.rename(folder)
            log(f'{name}: prepared in {folder}')
    return folder


# ---- the raw files --------------------------------------------------------------------------


def _fetch(name: str, data_dir: Path, scratch: Path) -> Raw:
    """Return the verified raw arrays from the first address that has them."""
    ways = {"TFDS's download URL": _download}
    if name == 'fashion_mnist':
        ways = {f"Debian's package {DEBIAN_PACKAGE}": _fetch_from_debian} | ways
    for description, fetch in ways.items():
        try:
            raw = read_raw(fetch(name, scratch), name)
        except (RunError, OSError, subprocess.SubprocessError) as error:
            log(f'{name}: {description} failed: {error}')
        else:
            log(f'{name}: from {description}, checksums verified')
            return raw
    raise RunError(
        f'{name} is not in {data_dir} and could not be downloaded: connect to the internet, or put '
        f'its four raw files ({FILES[0]}, ...) into a folder and run '
        f'`{prepared.command(name, data_dir)} --source=FOLDER`.'
    )


def _fetch_from_debian(name: str, scratch: Path) -> Path:
    """Return the folder of Debian's package; fetch it, as any user, if it is not installed."""
    if DEBIAN_FOLDER.is_dir():
        return DEBIAN_FOLDER
    apt = scratch.resolve() / 'apt'  # lists of our own: the system's belong to root
    for part in ('state/lists/partial', 'cache/archives/partial'):
        (apt / part).mkdir(parents=True)
    get = ['apt-get', '-o', 'Acquire::http::Timeout=30', '-o', 'Acquire::Retries=1',
           '-o', f'Dir::State={apt}/state', '-o', f'Dir::Cache={apt}/cache',
           '-o', 'Debug::NoLocking=1']  # fmt: skip
    for words in ([*get, 'update'], [*get, 'download', DEBIAN_PACKAGE]):
        subprocess.run(words, cwd=apt, capture_output=True, timeout=600, check=True)
    unpack = ['dpkg-deb', '-x', str(next(apt.glob('*.deb'))), str(apt)]
    subprocess.run(unpack, capture_output=True, check=True)
    return apt / DEBIAN_FOLDER.relative_to('/')


def _download(name: str, folder: Path) -> Path:
    """Download the four files from TFDS's address."""
    import tensorflow_datasets as tfds

    builder: Any = tfds.builder_cls(name)
    for file in FILES:
        url = builder.URL + file
        with urllib.request.urlopen(url, timeout=20) as answer, (folder / file).open('wb') as copy:
            shutil.copyfileobj(answer, copy)
    return folder


def read_raw(folder: Path, name: str = 'fashion_mnist') -> Raw:
    """Read the four gzipped IDX files in `folder`; RunError if one differs from the original."""
    sums = zip(FILES, SUMS[name], strict=True)
    images, labels, test_images, test_labels = [_read_idx(folder / file, sha) for file, sha in sums]
    return {'train': (images, labels), 'test': (test_images, test_labels)}


def _read_idx(path: Path, sha256: str) -> np.ndarray:
    try:
        raw = gzip.decompress(path.read_bytes())
        if hashlib.sha256(raw).hexdigest() != sha256:
            raise OSError('its sha256 is another')
    except (OSError, EOFError, zlib.error) as error:
        raise RunError(
            f'{path} is missing or not the original file ({error}): download it again.'
        ) from None
    axes = raw[3]  # the header: a magic number, then one big-endian int32 an axis
    shape = np.frombuffer(raw, '>i4', count=axes, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape)


# ---- the records ----------------------------------------------------------------------------


def write(raw: Raw, folder: Path, name: str = 'fashion_mnist') -> Path:
    """Write `raw` as TFDS's own builder would, but the same bytes in every process.

    Returns:
        `folder/name/3.0.1`, which `tfds.builder_from_directory` reads.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import hashing

    made, files = folder / name / VERSION, {}
    made.mkdir(parents=True)
    for split, (images, labels) in raw.items():
        log(f'{name}: writing {split}, {len(images):,} images')
        order = sorted(range(len(images)), key=hashing.Hasher(split).hash_key)  # TFDS's
        records = (shards.example(_png(images[i]), int(labels[i])) for i in order)
        path = made / prepared.shard_name(name, split, 0, 1)
        files[split] = [shards.write_records(path, records)]
    with contextlib.redirect_stdout(io.StringIO()):
        info = tfds.builder_cls(name)(data_dir=folder).info
    about = dict(description=info.description, homepage=info.homepage, citation=info.citation)
    shards.write_metadata(made, name, VERSION, info.features, files, **about)
    return made


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, 'png')
    return buffer.getvalue()
