"""Time the training step and the forward pass of each form of a net, on a batch on the device."""

import argparse
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from alexnet_jax.errors import RunError
from configs import ablation_lrn, alexnet, variant_torchvision
from experiments.throughput import baselines, roofline
from experiments.throughput.baselines import Case
from experiments.throughput.results import Row, environment
from experiments.throughput.timing import alternate, best_torch, ratio, run_alone

KINDS = ('ours', 'naive', 'torch')
NETS: dict[str, tuple[Any, str]] = {
    '2012': (alexnet, 'imagenet2012'),
    '2012_without_LRN': (ablation_lrn, 'imagenet2012'),
    'torchvision': (variant_torchvision, 'imagenet2012'),
    'quickstart': (alexnet, 'quickstart'),
}
BATCHES = {'cpu': (64, 128), 'gpu': (128, 1024)}
QUICKSTART_BATCH = 128  # its config's


def config_of(net: str) -> Any:
    """Return the config of a net of NETS."""
    module, scale = NETS[net]
    return module.get_config(scale)


def measure(net: str, batch_size: int, what: str, flags: argparse.Namespace) -> Row:
    """Measure every form of a net in one pass: a row of the part 'steps'.

    On a CPU PyTorch's forms run in one process, ours beside naive Flax in another, and ours beside
    the best of PyTorch in a third, as each large program in a process slows the others down. Each
    ratio is of one process. The figures of ours are those beside PyTorch.
    """

    def run(*forms: str) -> Row:
        devices = config_of(net).mesh.cpu_devices
        return run_alone(devices, sample, net, batch_size, what, forms, flags)

    if platform() != 'cpu':
        return run(*flags.kinds)
    found, kinds = [], {*flags.kinds}
    if 'torch' in kinds and baselines.torch_is_here():
        found.append(run('torch'))
    best = [found[0]['torch']] if found and found[0]['torch'] else []
    if 'naive' in kinds and NETS[net] == NETS['2012']:
        found.append(run(*(kind for kind in ('ours', 'naive') if kind in kinds)))
    if not found or ('ours' in kinds and best):
        found.append(run('ours', *best))
    row: Row = {'forms': {}, 'ratios': {}}
    for one in found:
        row |= one | {key: row[key] | one.get(key, {}) for key in ('forms', 'ratios')}
    return row


def sample(
    net: str, batch_size: int, what: str, forms: tuple[str, ...], flags: argparse.Namespace
) -> Row:
    """Measure some forms in turn, in this process; `forms` are names or kinds."""
    case = baselines.case_of(config_of(net), batch_size, flags.dtype)
    makers = {
        name: make
        for name, make in baselines.benchmarks(case, what)
        if {name, name.partition(',')[0]} & {*forms}
        and not any(word in name for word in flags.without)
    }
    rows, values = alternate(
        makers | roofline.benchmarks(flags.dtype), flags.rounds, flags.sample_secs
    )
    rates, best = roofline.take_rates(rows), best_torch(rows)
    row = {'net': net, 'batch_size': batch_size, 'dtype': flags.dtype, 'pass': what}
    row |= {
        'forms': rows,
        'limit_secs': roofline.step_secs(case.net, batch_size, what, rates),
        'flops': roofline.step_flops(case.net, batch_size, what),
        'flops_per_sec': rates.flops,
        'bytes_per_sec': rates.bytes,
        'torch': best,
    }
    _check(row, values, case)
    if 'ours' in rows:
        row['ratios'] = {
            name: ratio(rows[name], rows['ours']) for name in ('naive', best) if name in rows
        }
    return row | environment()


def _check(row: Row, values: Mapping[str, np.ndarray], case: Case) -> None:
    """Check that the forms compute the same logits; in training, that losses are finite."""
    found = {name: values[name] for name in row['forms'] if name in values}
    if row['pass'] == 'train':
        if lost := [name for name, loss in found.items() if not np.isfinite(loss).all()]:
            raise RunError(f'{row["net"]}: the loss of {lost} is not finite.')
        return
    first, reference = next(iter(found.items()))
    most = 1e-3 if case.net.compute_dtype == 'float32' else 5e-2  # bfloat16 has 8 bits
    for name, logits in found.items():
        error = np.linalg.norm(logits - reference) / np.linalg.norm(reference)
        row['forms'][name]['off_by'] = float(error)  # relative
        if not error < most:
            raise RunError(f'{row["net"]}: the logits of {name} are not those of {first}.')


def measure_all(flags: argparse.Namespace) -> Iterator[Row]:
    """Measure all nets, batch sizes and passes; yield their rows."""
    for net in flags.nets:
        usual = flags.batches or BATCHES[platform()]
        batches = (QUICKSTART_BATCH,) if net == 'quickstart' else usual
        for batch_size, what in itertools.product(batches, baselines.PASSES):
            yield measure(net, batch_size, what, flags)


def platform() -> str:
    """Return 'cpu' or 'gpu'."""
    return 'cpu' if jax.default_backend() == 'cpu' else 'gpu'
