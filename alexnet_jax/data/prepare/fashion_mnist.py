"""MNIST and Fashion-MNIST, from the first place that has their four raw files.

The bytes written depend on the images alone: TFDS's own writer serialises records in an order that
varies with the process. Order, features and description are those of TFDS's builders.
"""

import contextlib
import gzip
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from alexnet_jax.command import log
from alexnet_jax.data import prepared
from alexnet_jax.data.prepare.shards import example, record_writer, write_metadata
from alexnet_jax.data.prepared import Report
from alexnet_jax.errors import RunError, UsageError

Raw = dict[str, tuple[np.ndarray, np.ndarray]]  # {split: (uint8 [N, H, W], uint8 [N])}


class Idx(NamedTuple):
    """A raw file in the IDX format, as `<name>.gz` or unpacked."""

    name: str
    sha256: str  # of the unpacked bytes: gzip headers differ from copy to copy
    shape: tuple[int, ...]


def _files(*sums: str) -> dict[str, tuple[Idx, Idx]]:
    """Return {split: (images, labels)}."""
    found = {}
    for split, stem, count, pair in (
        ('train', 'train', 60_000, sums[:2]),
        ('test', 't10k', 10_000, sums[2:]),
    ):
        found[split] = (
            Idx(f'{stem}-images-idx3-ubyte', pair[0], (count, 28, 28)),
            Idx(f'{stem}-labels-idx1-ubyte', pair[1], (count,)),
        )
    return found


# With upstream's file name and time (31 August 2017) put back into their gzip headers, the files of
# Debian's package have the sums that TFDS 4.9.10 lists (url_checksums/fashion_mnist).
FILES = _files(
    'c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888',
    'bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9',
    '5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b',
    '0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34',
)
# Of the files at storage.googleapis.com/cvdf-datasets/mnist, as many public repositories list them.
DIGITS = _files(
    'ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db',
    '65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5',
    '0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7',
    'ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2',
)
VERSION = '3.0.1'  # of TFDS's builders
DEBIAN_PACKAGE = 'dataset-fashion-mnist'
DEBIAN_FOLDER = Path('datasets', 'fashion-mnist')  # under a share/ folder


def prepare(
    data_dir: str | Path,
    source: str | Path | None = None,
    report: Report = log,
    *,
    name: str = 'fashion_mnist',
) -> Path:
    """Prepare a data set in `data_dir` and return the builder's folder, at once if it is there.

    The raw files are taken from the first of these that has them: `source` (and then nothing else
    is tried); `data_dir/raw`; of Fashion-MNIST, Debian's package `dataset-fashion-mnist`, installed
    or fetched by `apt-get download`, which needs no root; the address that TFDS downloads from.

    Args:
        data_dir: the folder of all data sets.
        source: a folder with the four files.
        report: called with lines of progress.
        name: 'fashion_mnist', or 'mnist' for the digits.

    Raises:
        UsageError: `source` is no folder.
        RunError: no place has all files, `data_dir` cannot be written, or what is there is damaged.
    """
    data_dir, files = Path(data_dir), DIGITS if name == 'mnist' else FILES
    folder = data_dir / name / VERSION
    if source is not None and not Path(source).is_dir():
        raise UsageError(f'--source={source} is no folder: name the one with the raw .gz files.')
    if not folder.exists():
        with (
            prepared.locked_staging_dir(data_dir, name, report) as staging,
            tempfile.TemporaryDirectory(dir=staging) as scratch,
        ):
            if not folder.exists():  # else another process made it while this one waited
                if source is None:
                    raw = _find(name, data_dir, Path(scratch), report)
                else:
                    raw = read_raw(Path(source), files)
                report(f'{name}: writing 70,000 images (about 10 s)')
                written = write(raw, Path(scratch), report, name)
                folder.parent.mkdir(exist_ok=True)
                written.rename(folder)
                report(f'{name}: prepared in {folder}')
    prepared.check_complete(folder, {split: pair[0].shape[0] for split, pair in files.items()})
    return folder


def _find(name: str, data_dir: Path, scratch: Path, report: Report) -> Raw:
    """Return the verified raw arrays from the first place that has them."""
    places: dict[str, Callable[[], Path]] = {f'{data_dir / "raw"}': lambda: data_dir / 'raw'}
    files, package = DIGITS, ''
    if name == 'fashion_mnist':
        files, package = FILES, f"install Debian's package {DEBIAN_PACKAGE}, "
        places |= {
            f"Debian's package {DEBIAN_PACKAGE}": _installed,
            f'apt-get download {DEBIAN_PACKAGE}': lambda: _fetch_by_apt(scratch / 'apt'),
        }
    places['the address that TFDS names'] = lambda: _download(name, files, scratch)
    for place, find in places.items():
        try:
            raw = read_raw(find(), files)
        except RunError as error:
            report(f'{name}: not from {place}: {error}')
        else:
            report(f'{name}: from {place}, checksums verified')
            return raw
    again = prepared.command(name, data_dir)
    raise RunError(
        f'{name} is not in {data_dir} and could not be fetched: connect to the internet, {package}'
        f'or put its four raw files ({files["train"][0].name}.gz, ...) into a folder and run '
        f'`{again} --source=FOLDER`.'
    )


def _installed() -> Path:
    """Return the folder in which a system-wide data package puts the files."""
    xdg = os.environ.get('XDG_DATA_DIRS') or '/usr/local/share:/usr/share'
    shares = [Path(sys.base_prefix, 'share'), *map(Path, xdg.split(':')), Path('/usr/share')]
    found = (share / DEBIAN_FOLDER for share in shares if (share / DEBIAN_FOLDER).is_dir())
    return next(found, shares[-1] / DEBIAN_FOLDER)


def _fetch_by_apt(scratch: Path) -> Path:
    """Download and unpack Debian's package, as any user; nothing is installed."""
    lists = scratch.resolve() / 'apt'  # of our own: the system's may be absent, and are root's
    for part in ('state/lists/partial', 'cache/archives/partial'):
        (lists / part).mkdir(parents=True)
    net = ['-o', 'Acquire::http::Timeout=30', '-o', 'Acquire::Retries=1']
    own = ['-o', f'Dir::State={lists}/state', '-o', f'Dir::Cache={lists}/cache',
           '-o', 'Debug::NoLocking=1']  # fmt: skip
    try:
        _call(['apt-get', *net, 'download', DEBIAN_PACKAGE], scratch)
    except RunError:
        _call(['apt-get', *net, *own, 'update'], scratch)
        _call(['apt-get', *net, *own, 'download', DEBIAN_PACKAGE], scratch)
    deb = next(scratch.glob('*.deb'))
    _call(['dpkg-deb', '-x', str(deb.resolve()), 'unpacked'], scratch)
    return scratch / 'unpacked' / 'usr' / 'share' / DEBIAN_FOLDER


def _call(words: list[str], folder: Path) -> None:
    """Run a command in `folder`; RunError with its last line if it fails."""
    try:
        subprocess.run(
            words, cwd=folder, env=os.environ | {'LC_ALL': 'C'}, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, errors='replace', timeout=600, check=True,
        )  # fmt: skip
    except FileNotFoundError:
        raise RunError(f'this system has no {words[0]}.') from None
    except subprocess.TimeoutExpired:
        raise RunError(f'`{words[0]}` did not end within ten minutes.') from None
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or ['no reason given']
        raise RunError(f'`{words[0]}` failed: {lines[-1]}') from None


def _download(name: str, files: Mapping[str, tuple[Idx, Idx]], folder: Path) -> Path:
    """Download the four files from where TFDS has them."""
    from tensorflow_datasets.image_classification import mnist

    url = (mnist.MNIST if name == 'mnist' else mnist.FashionMNIST).URL
    for file in (f'{one.name}.gz' for pair in files.values() for one in pair):
        try:
            with (
                urllib.request.urlopen(f'{url}{file}', timeout=20) as answer,
                (folder / file).open('wb') as copy,
            ):
                shutil.copyfileobj(answer, copy)
        except (OSError, ValueError) as error:
            raise RunError(f'{url}{file}: {error}.') from None
    return folder


def read_raw(folder: Path, files: Mapping[str, tuple[Idx, Idx]] | None = None) -> Raw:
    """Read and verify the four IDX files in `folder`.

    Args:
        folder: holds them, gzipped or unpacked.
        files: FILES if not given, or DIGITS.

    Returns:
        {split: (images uint8 [N, 28, 28], labels uint8 [N])}.

    Raises:
        RunError: a file is missing, cannot be read, or has other contents than the original.
    """
    return {
        split: (_read_idx(folder, images), _read_idx(folder, labels))
        for split, (images, labels) in (files or FILES).items()
    }


def _read_idx(folder: Path, file: Idx) -> np.ndarray:
    path = folder / f'{file.name}.gz'
    if not path.exists() and (folder / file.name).exists():
        path = folder / file.name
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix == '.gz' else raw
    except FileNotFoundError:
        raise RunError(f'{path} is missing.') from None
    except (OSError, EOFError, zlib.error) as error:
        raise RunError(f'{path} cannot be read ({error}): download it again.') from None
    if hashlib.sha256(raw).hexdigest() != file.sha256:
        raise RunError(f'{path} is damaged (its sha256 is not the original): download it again.')
    header_bytes = 4 + 4 * len(file.shape)  # magic number, then one big-endian int32 an axis
    return np.frombuffer(raw, np.uint8, offset=header_bytes).reshape(file.shape)


def write(
    raw: Mapping[str, tuple[np.ndarray, np.ndarray]],
    folder: Path,
    report: Report = log,
    name: str = 'fashion_mnist',
) -> Path:
    """Write `raw` as TFDS's own builder would, but the same bytes in every process.

    Args:
        raw: {split: (images uint8 [N, 28, 28], labels uint8 [N])}.
        folder: of all data sets.
        report: called with lines of progress.
        name: see `prepare`.

    Returns:
        `folder/name/3.0.1`, which `tfds.builder_from_directory` reads.
    """
    from tensorflow_datasets.core import hashing
    from tensorflow_datasets.image_classification import mnist

    made, shards = folder / name / VERSION, {}
    made.mkdir(parents=True)
    for split, (images, labels) in raw.items():
        writer, size = record_writer(made / prepared.shard_name(name, split, 0, 1)), 0
        order = sorted(range(len(images)), key=hashing.Hasher(split).hash_key)  # as TFDS shuffles
        for number, index in enumerate(order):
            if number % 10_000 == 0:
                report(f'{name}: {split}, image {number:,} of {len(images):,}')
            record = example(_png(images[index]), int(labels[index]))
            writer.write(record)
            size += len(record)
        writer.close()
        shards[split] = [(len(images), size)]
    with contextlib.redirect_stdout(io.StringIO()):
        info = (mnist.MNIST if name == 'mnist' else mnist.FashionMNIST)(data_dir=folder).info
    about = dict(description=info.description, homepage=info.homepage, citation=info.citation)
    write_metadata(made, name, VERSION, info.features, shards, **about)
    return made


def _png(image: np.ndarray) -> bytes:
    """Return `image` (uint8 [H, W]) as PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format='png')
    return buffer.getvalue()
