"""Weight files of other frameworks, read into NumPy arrays by name; nothing in them is ever run.

| suffix | whose | read by |
|---|---|---|
| .pth, .pt | PyTorch's state dicts | PyTorch (weights only) where it is, else `_Unpickler` |
| .safetensors | Hugging Face's format, and ours | safetensors |
| .npz | NumPy's, without objects | NumPy |
| .caffemodel | Caffe's, layers of either generation | protobuf |

Every complaint is one sentence that names the file and, where there is one, the first key at fault.
"""

import functools
import importlib
import io
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from alexnet_jax.command import library
from alexnet_jax.errors import RunError, UsageError

Arrays = dict[str, np.ndarray]


def read(path: Path) -> Arrays:
    """All arrays of a weight file, by the names that it has for them.

    Caffe's blobs are called 'conv1/0' (weights) and 'conv1/1' (biases).

    Raises:
        UsageError: the suffix is not one of `READERS`.
        RunError: the file is not there or damaged, holds anything but arrays, or the library that
            reads it is not installed.
    """
    reader = READERS.get(path.suffix)
    if reader is None:
        raise UsageError(f'{path}: the name must end in {", ".join(READERS)}.')
    if not path.is_file():
        raise RunError(f'{path} is not there; give the path of a weight file.')
    try:
        return reader(path)
    except RunError:
        raise
    except Exception as problem:  # damage shows as any of many, in each of the libraries
        raise _damaged(path, ' '.join(str(problem).split())[:120]) from problem


def _damaged(path: Path, reason: str) -> RunError:
    return RunError(f'{path} is damaged or not what its name says ({reason}); get it anew.')


def _unsafe(path: Path, name: str) -> RunError:
    return RunError(
        f'{path} holds code to run, {name}, and not weights alone: it was not opened; do not trust '
        f'where it came from.'
    )


# -------------------------------------------------------------------------------------- PyTorch


def _read_pth(path: Path) -> Arrays:
    try:
        torch: Any = importlib.import_module('torch')
    except ImportError:
        return _read_zipped_pth(path)
    try:
        tree = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as problem:
        if found := re.search(r'GLOBAL (\S+)', str(problem)):
            raise _unsafe(path, found[1]) from problem
        raise
    arrays = {name: x.numpy() for name, x in _entries(path, tree) if isinstance(x, torch.Tensor)}
    return _arrays_only(path, tree, arrays)


def _read_zipped_pth(path: Path) -> Arrays:
    """What torch.save has written since PyTorch 1.6, read without PyTorch."""
    if not zipfile.is_zipfile(path):
        raise RunError(
            f'{path} is damaged, or in the format from before PyTorch 1.6; in the second case pip '
            f'install torch, which reads it.'
        )
    with zipfile.ZipFile(path) as archive:
        tree = _Unpickler(path, archive).load()
    arrays = {name: x for name, x in _entries(path, tree) if isinstance(x, np.ndarray)}
    return _arrays_only(path, tree, arrays)


def _entries(path: Path, tree: Any) -> list[tuple[str, Any]]:
    if not isinstance(tree, Mapping):
        raise RunError(f'{path} holds a {type(tree).__name__}; save model.state_dict() instead.')
    return [(str(name), value) for name, value in tree.items()]


def _arrays_only(path: Path, tree: Mapping[Any, Any], arrays: Arrays) -> Arrays:
    for name in tree:
        if str(name) not in arrays:
            raise RunError(f'{path}: {name} is no array; save model.state_dict() alone.')
    return arrays


STORAGES = {
    'FloatStorage': '<f4',
    'DoubleStorage': '<f8',
    'HalfStorage': '<f2',
    'LongStorage': '<i8',
}


class _Unpickler(pickle.Unpickler):
    """Builds dictionaries of arrays; whatever else a pickle asks for is refused.

    The standard library's own way of restricting pickles ("Restricting Globals").
    """

    def __init__(self, path: Path, archive: zipfile.ZipFile):
        [index] = [name for name in archive.namelist() if name.endswith('/data.pkl')]
        self.path, self.archive, self.folder = path, archive, index.removesuffix('data.pkl')
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise RunError(f'{path} is compressed, as PyTorch never writes it; it was not opened.')
        super().__init__(io.BytesIO(archive.read(index)))

    def find_class(self, module: str, name: str) -> Any:
        if module == 'torch' and name in STORAGES:
            return STORAGES[name]
        if (module, name) == ('torch._utils', '_rebuild_tensor_v2'):
            return lambda *parts: _tensor(*parts)  # a fresh one: a pickle may set its attributes
        if (module, name) == ('collections', 'OrderedDict'):
            return OrderedDict
        raise _unsafe(self.path, f'{module}.{name}')

    def persistent_load(self, pid: Any) -> np.ndarray:
        """('storage', type, name of the file in the archive, device, number of elements)."""
        _, dtype, name, *_ = pid
        return np.frombuffer(self.archive.read(f'{self.folder}data/{name}'), dtype)


def _tensor(storage: np.ndarray, offset: int, size: Any, stride: Any, *_: Any) -> np.ndarray:
    """A view of a storage, in elements; NumPy checks that it lies within."""
    item = storage.itemsize
    strides = [step * item for step in stride]
    return np.ndarray(tuple(size), storage.dtype, storage.data, offset * item, strides)


# ---------------------------------------------------------------------------- safetensors, NumPy


def _read_safetensors(path: Path) -> Arrays:
    with library('safetensors', 'weights').safe_open(path, framework='np') as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)


def metadata(path: Path) -> dict[str, str]:
    """What stands in the head of a .safetensors file."""
    with library('safetensors', 'weights').safe_open(path, framework='np') as file:
        return file.metadata() or {}


def _read_npz(path: Path) -> Arrays:
    if not zipfile.is_zipfile(path):
        raise _damaged(path, 'it is no zip archive')
    with np.load(path, allow_pickle=False) as file:
        return {name: _member(path, file, name) for name in file.files}


def _member(path: Path, file: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    try:
        return file[name]
    except ValueError as problem:
        if 'allow_pickle' in str(problem):
            raise _unsafe(path, f'in {name}') from problem
        raise


# ---------------------------------------------------------------------------------------- Caffe

# The part of Caffe's schema in which weights lie: message -> field: (number, type). Field 2 of a
# net holds layers of the first generation, 100 of the second; num, channels, height and width are
# a blob's shape in the first. Values are packed floats, and on the wire those are bytes.
SCHEMA = {
    'Net': {'layers': (2, 'OldLayer'), 'layer': (100, 'Layer')},
    'OldLayer': {'name': (4, 'string'), 'blobs': (6, 'Blob')},
    'Layer': {'name': (1, 'string'), 'blobs': (7, 'Blob')},
    'Blob': {
        'num': (1, 'int32'),
        'channels': (2, 'int32'),
        'height': (3, 'int32'),
        'width': (4, 'int32'),
        'data': (5, 'bytes'),
        'double_data': (8, 'bytes'),
        'shape': (7, 'Shape'),
    },
    'Shape': {'dim': (1, 'int64')},
}
REPEATED = ('layers', 'layer', 'blobs', 'dim')


def _read_caffemodel(path: Path) -> Arrays:
    net = _message('Net').FromString(path.read_bytes())
    return {
        f'{layer.name}/{number}': _blob(path, f'{layer.name}/{number}', blob)
        for layer in (*net.layers, *net.layer)
        for number, blob in enumerate(layer.blobs)
    }


def mean_image(path: Path) -> np.ndarray:
    """Caffe's mean image, .binaryproto or .npy: [H, W, C], channels in Caffe's order, BGR.

    Raises:
        RunError: the file is not there or not what its name says.
    """
    try:
        if path.suffix == '.npy':
            image = np.load(path, allow_pickle=False)
        else:
            image = _blob(path, 'mean', _message('Blob').FromString(path.read_bytes()))[0]
        return image.transpose(1, 2, 0).astype(np.float32)
    except OSError as problem:
        raise RunError(f'{path} cannot be read ({problem.strerror}).') from problem
    except Exception as problem:
        raise _damaged(path, ' '.join(str(problem).split())[:120]) from problem


def _blob(path: Path, name: str, blob: Any) -> np.ndarray:
    values = np.frombuffer(blob.data, '<f4') if blob.data else np.frombuffer(blob.double_data)
    old = (blob.num, blob.channels, blob.height, blob.width)
    shape = tuple(blob.shape.dim) or old
    if np.prod(shape) != values.size:
        raise _damaged(path, f'{name} has {values.size} values for a shape of {shape}')
    return values.reshape(shape)


@functools.cache
def _message(name: str) -> Any:
    """A class that protobuf makes of `SCHEMA`."""
    descriptor = library('google.protobuf.descriptor_pb2', 'weights')
    types = dict(descriptor.FieldDescriptorProto.Type.items())
    file = descriptor.FileDescriptorProto(name='caffe.proto', package='caffe', syntax='proto2')
    for message, fields in SCHEMA.items():
        entry = file.message_type.add(name=message)
        for field, (number, kind) in fields.items():
            row = entry.field.add(name=field, number=number)
            row.label = 3 if field in REPEATED else 1
            row.type = types.get(f'TYPE_{kind.upper()}', types['TYPE_MESSAGE'])
            if kind in SCHEMA:
                row.type_name = f'.caffe.{kind}'
    pool = library('google.protobuf.descriptor_pool', 'weights').DescriptorPool()
    pool.Add(file)
    found = pool.FindMessageTypeByName(f'caffe.{name}')
    return library('google.protobuf.message_factory', 'weights').GetMessageClass(found)


READERS: dict[str, Callable[[Path], Arrays]] = {
    '.pth': _read_pth,
    '.pt': _read_pth,
    '.safetensors': _read_safetensors,
    '.npz': _read_npz,
    '.caffemodel': _read_caffemodel,
}
