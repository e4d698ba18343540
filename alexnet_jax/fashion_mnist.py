"""Fashion-MNIST, from wherever it is to be had, written as TFDS's own builder would write it."""

import contextlib
import gzip
import hashlib
import io
import os
import shutil
import subprocess
import sys
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from alexnet_jax import prepared
from alexnet_jax.command import say
from alexnet_jax.errors import RunError, UsageError
from alexnet_jax.prepared import Report

Raw = dict[str, tuple[np.ndarray, np.ndarray]]  # {split: (uint8 [N, H, W], uint8 [N])}


class Idx(NamedTuple):
    """One raw file in the IDX format, gzipped under `<name>.gz`."""

    name: str
    sha256: str  # of the decompressed bytes
    shape: tuple[int, ...]


# The decompressed bytes are checked because gzip headers differ from copy to copy. With upstream's
# file name and time (31 August 2017) put back into the headers, the files of Debian's package have
# the very checksums that TFDS 4.9.10 lists for upstream's four files (url_checksums/fashion_mnist).
# fmt: off
FILES = {  # {split: (images, labels)}
    'train': (
        Idx('train-images-idx3-ubyte',
            'c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888', (60_000, 28, 28)),
        Idx('train-labels-idx1-ubyte',
            'bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9', (60_000,)),
    ),
    'test': (
        Idx('t10k-images-idx3-ubyte',
            '5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b', (10_000, 28, 28)),
        Idx('t10k-labels-idx1-ubyte',
            '0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34', (10_000,)),
    ),
}
# fmt: on
VERSION = '3.0.1'  # of TFDS's builder
DEBIAN_PACKAGE = 'dataset-fashion-mnist'
DEBIAN_FOLDER = Path('datasets', 'fashion-mnist')  # under a share/ folder


def prepare(data_dir: str | Path, source: str | Path | None = None, report: Report = say) -> Path:
    """Prepare Fashion-MNIST in `data_dir` and return the builder's folder, at once if it is there.

    The raw files are taken from the first of these that has them whole: `source` (and then nothing
    else is tried); `data_dir/raw`; Debian's package `dataset-fashion-mnist` where it is installed;
    the same package fetched by `apt-get download`, which needs no root; TFDS's own download.

    Raises:
        UsageError: `source` is no folder.
        RunError: no way led to the whole data, `data_dir` cannot be written, or what lies there
            under the data set's name is damaged.
    """
    data_dir = Path(data_dir)
    folder = data_dir / 'fashion_mnist' / VERSION
    if source is not None and not Path(source).is_dir():
        raise UsageError(f'--source={source} is no folder: name the one with the raw .gz files.')
    if not folder.exists():
        with (
            prepared.cannot_write(data_dir),
            prepared.workroom(data_dir, 'fashion_mnist', report) as room,
        ):
            if not folder.exists():  # else another process made it while this one waited
                raw = _find(data_dir, source, room, report)
                report('Fashion-MNIST: writing 70,000 images (about 10 s)')
                written = write(raw, room / 'tfds', report)
                folder.parent.mkdir(exist_ok=True)
                written.rename(folder)
                report(f'Fashion-MNIST: prepared in {folder}')
    sizes = {split: images.shape[0] for split, (images, _) in FILES.items()}
    prepared.check_whole(folder, sizes)
    return folder


def _find(data_dir: Path, source: str | Path | None, room: Path, report: Report) -> Raw:
    """The verified raw arrays, from the first way that leads to them."""
    if source is not None:
        return read_raw(Path(source))
    ways: tuple[tuple[str, Callable[[], Path]], ...] = (
        (f'{data_dir / "raw"}', lambda: _existing([data_dir / 'raw'])),
        (f"Debian's package {DEBIAN_PACKAGE}", lambda: _existing(_share_folders())),
        (f'apt-get download {DEBIAN_PACKAGE}', lambda: _fetch_by_apt(room / 'apt')),
        ("TFDS's own download", lambda: _fetch_by_tfds(room / 'download')),
    )
    for way, find in ways:
        try:
            raw = read_raw(find())
        except RunError as error:
            report(f'Fashion-MNIST: not from {way}: {error}')
        else:
            report(f'Fashion-MNIST: from {way}, checksums verified')
            return raw
    raise RunError(
        f'Fashion-MNIST is not in {data_dir} and could not be fetched: connect to the internet, '
        f"install Debian's package {DEBIAN_PACKAGE}, or put the four .gz files of "
        f'github.com/zalandoresearch/fashion-mnist into {data_dir / "raw"} and run '
        f'`{prepared.command("fashion_mnist", data_dir)}` again.'
    )


def _existing(folders: Iterable[Path]) -> Path:
    for folder in folders:
        if folder.is_dir():
            return folder
    raise RunError('it is not there.')


def _share_folders() -> list[Path]:
    """Where a system-wide data package may lie, most specific first."""
    xdg = os.environ.get('XDG_DATA_DIRS') or '/usr/local/share:/usr/share'
    shares = [Path(sys.base_prefix, 'share'), *map(Path, xdg.split(':')), Path('/usr/share')]
    return [share / DEBIAN_FOLDER for share in shares]


def _fetch_by_apt(room: Path) -> Path:
    """Fetch and unpack Debian's package into `room`, as any user, nothing installed."""
    if not (shutil.which('apt-get') and shutil.which('dpkg-deb')):
        raise RunError('this system has no apt-get and dpkg-deb.')
    (room / 'state' / 'lists' / 'partial').mkdir(parents=True)
    (room / 'cache' / 'archives' / 'partial').mkdir(parents=True)
    net = ['-o', 'Acquire::http::Timeout=30', '-o', 'Acquire::Retries=1']
    # Package lists of our own: the system's may be absent or too old, and are root's to renew.
    own = ['-o', f'Dir::State={room.resolve() / "state"}']
    own += ['-o', f'Dir::Cache={room.resolve() / "cache"}', '-o', 'Debug::NoLocking=1']
    download = ['download', DEBIAN_PACKAGE]
    try:
        _call(['apt-get', *net, *download], room)
    except RunError:
        _call(['apt-get', *net, *own, 'update'], room)
        _call(['apt-get', *net, *own, *download], room)
    deb = next(room.glob('*.deb'), None)
    if deb is None:
        raise RunError('apt-get download left no package.')
    _call(['dpkg-deb', '-x', str(deb.resolve()), 'unpacked'], room)
    return room / 'unpacked' / 'usr' / 'share' / DEBIAN_FOLDER


def _call(words: list[str], folder: Path) -> None:
    """Run a command in `folder`; RunError with its last line where it fails or hangs."""
    try:
        done = subprocess.run(
            words,
            cwd=folder,
            env=os.environ | {'LC_ALL': 'C'},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors='replace',
            timeout=600,
        )
    except subprocess.TimeoutExpired:
        raise RunError(f'`{words[0]}` did not end within ten minutes.') from None
    if done.returncode:
        said = done.stderr.strip().splitlines() or ['no reason given']
        raise RunError(f'`{words[0]}` said: {said[-1]}')


def _fetch_by_tfds(room: Path) -> Path:
    """Fetch upstream's four files by TFDS's download manager, which checks its own sums."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.image_classification import mnist

    urls = {
        file.name: f'{mnist.FashionMNIST.URL}{file.name}.gz'
        for pair in FILES.values()
        for file in pair
    }
    tfds.disable_progress_bar()
    try:  # TFDS retries for minutes where there is no network: ask once, with a limit
        ask = urllib.request.Request(next(iter(urls.values())), method='HEAD')
        with urllib.request.urlopen(ask, timeout=20):
            pass
        manager = tfds.download.DownloadManager(download_dir=room, dataset_name='fashion_mnist')
        paths: Any = manager.download(urls)
    except Exception as error:  # the library promises no set of exceptions
        reason = (str(error).splitlines() or [''])[0]
        raise RunError(f'{type(error).__name__}: {reason}.') from error
    for name in urls:
        Path(paths[name]).rename(room / f'{name}.gz')
    return room


def read_raw(folder: Path) -> Raw:
    """Read and verify the four gzipped IDX files of `folder`.

    Returns:
        {split: (images uint8 [N, 28, 28], labels uint8 [N])}.

    Raises:
        RunError: a file is missing, cannot be read, or has other contents than the original.
    """
    return {
        split: (_read_idx(folder, images), _read_idx(folder, labels))
        for split, (images, labels) in FILES.items()
    }


def _read_idx(folder: Path, file: Idx) -> np.ndarray:
    path = folder / f'{file.name}.gz'
    try:
        raw = gzip.decompress(path.read_bytes())
    except FileNotFoundError:
        raise RunError(f'{path} is missing.') from None
    except (OSError, EOFError, zlib.error) as error:
        raise RunError(f'{path} cannot be read ({error}): fetch it again.') from None
    if hashlib.sha256(raw).hexdigest() != file.sha256:
        raise RunError(f'{path} is damaged (its sha256 is not the original): fetch it again.')
    header_bytes = 4 + 4 * len(file.shape)  # magic number, then one big-endian int32 an axis
    return np.frombuffer(raw, np.uint8, offset=header_bytes).reshape(file.shape)


def write(raw: Mapping, folder: Path, report: Report) -> Path:
    """Write `raw` as TFDS's own builder `fashion_mnist` would, into `folder`.

    Args:
        raw: {split: (images uint8 [N, 28, 28], labels uint8 [N])}.
        folder: a new TFDS data_dir.
        report: called with a line of progress now and then.

    Returns:
        `folder/fashion_mnist/3.0.1`, which `tfds.builder_from_directory` reads.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.image_classification import mnist

    class FashionMnist(mnist.FashionMNIST, skip_registration=True):
        """The official description, features, labels and version over arrays in memory."""

        def _split_generators(self, dl_manager):
            return {split: self._examples(split) for split in raw}

        def _examples(self, split):
            images, labels = raw[split]
            for index, (image, label) in enumerate(zip(images, labels, strict=True)):
                if index % 10_000 == 0:
                    report(f'Fashion-MNIST: {split}, image {index:,} of {len(images):,}')
                yield index, {'image': _png(image), 'label': int(label)}

    tfds.disable_progress_bar()
    builder = FashionMnist(data_dir=folder, file_format='array_record')
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints its own story to stdout
        builder.download_and_prepare()
    return Path(builder.data_dir)


def _png(image: np.ndarray) -> io.BytesIO:
    """`image` (uint8 [H, W]) as PNG; TFDS would call TensorFlow to encode an array."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format='png')
    buffer.seek(0)
    return buffer
