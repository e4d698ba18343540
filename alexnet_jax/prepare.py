"""Fetch a data set and write it in TFDS's format (array_record), without TensorFlow.

    python -m alexnet_jax.prepare fashion_mnist --data_dir=data

A prepared set appears under its final name by one rename when it is whole, so what an interrupted
run leaves is never taken for a data set. What was written is read by
`tfds.builder_from_directory(folder)` and by `alexnet_jax.data.load`.
"""

import argparse
import contextlib
import errno
import fcntl
import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import urllib.request
import zlib
from collections.abc import Callable, Generator, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from alexnet_jax.errors import AlexNetError, RunError, UsageError

Report = Callable[[str], None]
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
FASHION_MNIST = {  # {split: (images, labels)}
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
FASHION_MNIST_VERSION = '3.0.1'  # of TFDS's builder
DEBIAN_PACKAGE = 'dataset-fashion-mnist'
DEBIAN_FOLDER = Path('datasets', 'fashion-mnist')  # under a share/ folder


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# ---- Fashion-MNIST --------------------------------------------------------------------------


def fashion_mnist(
    data_dir: str | Path, source: str | Path | None = None, report: Report = _say
) -> Path:
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
    folder = data_dir / 'fashion_mnist' / FASHION_MNIST_VERSION
    if source is not None and not Path(source).is_dir():
        raise UsageError(f'--source={source} is no folder: name the one with the raw .gz files.')
    if not folder.exists():
        with _cannot_write(data_dir), _workroom(data_dir, 'fashion_mnist', report) as room:
            if not folder.exists():  # else another process made it while this one waited
                raw = _find_fashion_mnist(data_dir, source, room, report)
                report('Fashion-MNIST: writing 70,000 images (about 10 s)')
                written = write_fashion_mnist(raw, room / 'tfds', report)
                folder.parent.mkdir(exist_ok=True)
                written.rename(folder)
                report(f'Fashion-MNIST: prepared in {folder}')
    sizes = {split: images.shape[0] for split, (images, _) in FASHION_MNIST.items()}
    check_whole(folder, sizes)
    return folder


def _find_fashion_mnist(
    data_dir: Path, source: str | Path | None, room: Path, report: Report
) -> Raw:
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
        f'`{command("fashion_mnist", data_dir)}` again.'
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
        for pair in FASHION_MNIST.values()
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
        raise RunError(f'{type(error).__name__}: {str(error).splitlines()[0]}.') from error
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
        for split, (images, labels) in FASHION_MNIST.items()
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


def write_fashion_mnist(raw: Mapping, folder: Path, report: Report) -> Path:
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


# ---- what all data sets share ---------------------------------------------------------------


def command(name: str, data_dir: str | Path) -> str:
    """What a person types to prepare data set `name`."""
    return f'python -m alexnet_jax.prepare {name} --data_dir={data_dir}'


def ensure(name: str, data_dir: str | Path) -> None:
    """Prepare data set `name` now, if it is not there yet and this program knows how to."""
    if name in DATASETS:
        DATASETS[name](data_dir)


DATASETS = {'fashion_mnist': fashion_mnist}  # what this program can prepare


def shards(folder: Path) -> dict[str, tuple[int, list[Path]]]:
    """The splits of a prepared data set, read from TFDS's `dataset_info.json`.

    Returns:
        {split: (number of examples, its array_record files in order)}.

    Raises:
        RunError: the description is missing or unreadable, or array_record files are missing.
    """
    try:
        info = json.loads((folder / 'dataset_info.json').read_text())
        lengths = {s['name']: [int(n) for n in s['shardLengths']] for s in info['splits']}
        stem = info['name']
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(folder, f'dataset_info.json: {error}') from None
    found = {}
    for split, counts in lengths.items():
        files = [
            folder / f'{stem}-{split}.array_record-{i:05d}-of-{len(counts):05d}'
            for i in range(len(counts))
        ]
        for file in files:
            if not file.is_file():
                raise damaged(folder, f'{file.name} is missing')
        found[split] = (sum(counts), files)
    return found


def check_whole(folder: Path, sizes: Mapping[str, int]) -> None:
    """Raise RunError unless `folder` has exactly the splits {name: examples} in readable files."""
    from array_record.python.array_record_module import (  # ty: ignore[import-not-found]
        ArrayRecordReader,  # a compiled module without stubs
    )

    splits = shards(folder)
    if {name: count for name, (count, _) in splits.items()} != dict(sizes):
        raise damaged(folder, 'its splits are not the official ones')
    for count, files in splits.values():
        try:
            records = sum(ArrayRecordReader(str(file)).num_records() for file in files)
        except Exception as error:  # array_record raises whatever its C++ status maps to
            raise damaged(folder, str(error).splitlines()[0]) from None
        if records != count:
            raise damaged(folder, f'{records:,} records where {count:,} should be')


def damaged(folder: Path, reason: str) -> RunError:
    """The error for a prepared data set that cannot be used: says what to remove and to run."""
    name, data_dir = folder.parent.name, folder.parent.parent
    return RunError(
        f'The data set in {folder} is damaged ({reason}): remove that folder and run '
        f'`{command(name, data_dir)}`.'
    )


@contextlib.contextmanager
def _workroom(data_dir: Path, name: str, report: Report) -> Generator[Path]:
    """An empty scratch folder in `data_dir`, this process's alone until it leaves.

    The lock goes with its process, however that dies; so whoever holds it may sweep up after one
    that was killed.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    room = data_dir / f'.prepare-{name}'
    with open(data_dir / f'.prepare-{name}.lock', 'w') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f'{name}: another process is preparing it; waiting')
            fcntl.flock(lock, fcntl.LOCK_EX)
        shutil.rmtree(room, ignore_errors=True)
        room.mkdir()
        try:
            yield room
        finally:
            shutil.rmtree(room, ignore_errors=True)


@contextlib.contextmanager
def _cannot_write(data_dir: Path) -> Generator[None]:
    """Turn what the file system or TFDS's writers raise into one sentence."""
    try:
        yield
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) else _full_disk(str(error))
        if not reason:
            raise
        raise RunError(
            f'Cannot prepare data in {data_dir} ({reason}): give it space and write permission, '
            'or choose another folder with --data_dir.'
        ) from error


def _full_disk(message: str) -> str | None:
    """The cause hidden in a message of TFDS's writers, which raise no OSError."""
    causes = (os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
    return next((cause for cause in causes if cause in message), None)


# ---- the command ----------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f'{message} (see python -m alexnet_jax.prepare --help).')


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog='python -m alexnet_jax.prepare', description='Prepare a data set.')
    datasets = parser.add_subparsers(dest='name', required=True, metavar='DATASET')
    one = datasets.add_parser('fashion_mnist', help='70,000 images of clothes, 28 x 28, 31 MB')
    one.add_argument('--data_dir', type=Path, default=Path('data'), help='where data sets lie')
    one.add_argument('--source', type=Path, help='folder with the four raw .gz files')
    one.set_defaults(prepare=lambda args: fashion_mnist(args.data_dir, args.source))
    return parser


def main(argv: list[str] | None = None) -> int:
    """Prepare what the command line names and print its folder; returns the exit code."""
    try:
        args = _parser().parse_args(argv)
        print(args.prepare(args))
    except AlexNetError as error:
        _say(f'error: {error}')
        return error.exit_code
    except KeyboardInterrupt:
        _say('interrupted: nothing half-made was left; run the command again.')
        return 130
    return 0


if __name__ == '__main__':
    sys.exit(main())
