"""Time the training step and the forward pass of each form of a net, on a batch on the device."""

import argparse
import itertools
import statistics
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from alexnet_jax.errors import RunError
from configs import ablation_lrn, alexnet, variant_torchvision
from experiments.throughput import baselines, roofline
from experiments.throughput.baselines import Case
from experiments.throughput.results import environment, keep
from experiments.throughput.timing import Row, alternate, best_torch, median, ratio

KINDS = ('ours', 'naive', 'torch')
NETS: dict[str, tuple[Any, str]] = {
    '2012': (alexnet, 'imagenet2012'),
    '2012_without_LRN': (ablation_lrn, 'imagenet2012'),
    'torchvision': (variant_torchvision, 'imagenet2012'),
    'quickstart': (alexnet, 'quickstart'),
}
BATCHES = {'cpu': (64, 128), 'gpu': (128, 1024)}
QUICKSTART_BATCH = 128  # its config's


def measure(net: str, batch_size: int, dtype: str, what: str, flags: argparse.Namespace) -> Row:
    """Measure every form of a net in one pass, in turn: a row of the part 'steps'."""
    module, scale = NETS[net]
    case = baselines.case_of(module.get_config(scale), batch_size, dtype)
    makers = {
        name: make
        for name, make in baselines.benchmarks(case, what, flags.kinds)
        if not any(word in name for word in flags.without)
        and (not flags.form or name in (flags.form, *KINDS))
    }
    makers |= {'product': lambda: roofline.product(dtype), 'copy': roofline.copying}
    rows, values = alternate(makers, flags.rounds, flags.sample_secs)
    rates = roofline.rates(*(median(rows.pop(name)) for name in ('product', 'copy')))
    row = {'net': net, 'batch_size': batch_size, 'dtype': dtype, 'pass': what, 'forms': rows}
    row |= {
        'limit_secs': roofline.step_secs(case.net, batch_size, what, rates),
        'flops': roofline.step_flops(case.net, batch_size, what),
        'flops_per_sec': rates.flops,
        'bytes_per_sec': rates.bytes,
        'torch': None,
    }
    _check(row, values, case)
    if (best := best_torch(rows)) is not None:
        row['torch'] = best
    if 'ours' in rows:
        row['ratios'] = {
            name: ratio(rows[name], rows['ours']) for name in ('naive', best) if name in rows
        }
    return row | environment()


def _check(row: Row, values: Mapping[str, np.ndarray], case: Case) -> None:
    """Check that the forms compute the same logits; in training, that losses are finite."""
    if row['pass'] == 'forward':
        names = [name for name in row['forms'] if name in values]
        reference = values[names[0]]
        for name in names:
            error = np.linalg.norm(values[name] - reference) / np.linalg.norm(reference)
            row['forms'][name]['off_by'] = float(error)  # relative, of the logits
        most = 1e-3 if case.net.compute_dtype == 'float32' else 5e-2  # bfloat16 has 8 bits
        off = [name for name in names if not row['forms'][name]['off_by'] < most]
        if off:
            raise RunError(f'{row["net"]}: the logits of {off} are not those of {names[0]}.')
    else:
        lost = [n for n in row['forms'] if n in values and not np.isfinite(values[n]).all()]
        if lost:
            raise RunError(f'{row["net"]}: the loss of {lost} is not finite.')


def measure_all(flags: argparse.Namespace) -> list[Row]:
    """Measure, print and store all rows of the part."""
    rows = []
    for net in flags.nets:
        for batch_size, what in itertools.product(batches(net, flags), flags.passes):
            rows.append(measure(net, batch_size, flags.dtype, what, flags))
            print_row(rows[-1])
            keep(flags.out, 'steps', rows[-1:])
    return rows


def batches(net: str, flags: argparse.Namespace) -> tuple[int, ...]:
    """Return the batch sizes of a net's rows."""
    if net == 'quickstart':
        return (QUICKSTART_BATCH,)
    return flags.batches or BATCHES[platform()]


def print_row(row: Row) -> None:
    """Print a row."""
    size, limit = row['batch_size'], row['limit_secs']
    print(f'{row["net"]}, {row["pass"]}, batch {size}, {row["dtype"]}, on {row["device"]}')
    for name, form in sorted(row['forms'].items(), key=lambda pair: pair[1].get('secs', [9e9])):
        if 'failed' in form:
            print(f'  {name:36} failed: {form["failed"].splitlines()[0][:80]}')
            continue
        secs = median(form)
        spread = f'{1e3 * min(form["secs"]):.1f} to {1e3 * max(form["secs"]):.1f}'
        print(
            f'  {name:36} {size / secs:9.1f} images/s {1e3 * secs:9.1f} ms ({spread}; '
            f'{len(form["secs"])} rounds) {1e3 * statistics.median(form["cpu_secs"]):9.1f} ms of '
            f'processor time; {limit / secs:.0%} of the limit'
        )
    shown = ', '.join(f'{value:.2f} x {name}' for name, value in row.get('ratios', {}).items())
    print(
        f'  limit {1e3 * limit:.1f} ms: products {row["flops_per_sec"] / 1e9:.0f} GFLOP/s, copy '
        f'{row["bytes_per_sec"] / 1e9:.1f} GB/s' + (f'; ours is {shown}' if shown else ''),
        flush=True,
    )
    if row['torch'] is None:
        print('  no PyTorch here, or not asked for: our rows alone', flush=True)


def platform() -> str:
    """Return 'cpu' or 'gpu'."""
    return 'cpu' if jax.default_backend() == 'cpu' else 'gpu'
