"""How fast, beside PyTorch, beside a naive Flax form, and beside what the machine could do.

    python -m experiments.throughput                             # all parts: an hour on two cores
    python -m experiments.throughput --parts=steps --nets=2012 --batches=64 --rounds=3 \\
        --kinds=ours,torch --without=compiled --out=quick        # some minutes less
    python -m experiments.throughput --parts=layers              # where the time goes
    python -m experiments.throughput --page                      # tables and chart of what is kept

| part | what is measured |
|---|---|
| steps | training step and forward pass on a resident batch, by form of the net (peers.py), and the limit (limits.py) |
| layers | each layer's operations alone, forward and backward, against their limits (layers.py) |
| feeding | training on real input against the step on a resident batch (feeding.py) |
| start | seconds to the first step, with and without compiled programs at hand (feeding.py) |

What is compared takes turns: each round gives every contestant one sample, of as many steps as fill
--sample_secs. Figures are medians over the rounds, ratios medians of each round's own ratio. Forms
of PyTorch that took half as long again as its best in the first round sit out the rest. On a CPU
PyTorch's forms run in a process of their own, and ours takes turns with the best of them in
another, and in others with each other form of Flax.
Results go to experiments/results/throughput/<device>.json, row by row: a row that is measured again
takes the place of the old one. tables.md and <device>.svg are made from it.
"""  # noqa: E501 (a table)

import argparse
import gc
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# Half of a GPU's memory for JAX: PyTorch wants some too. Before JAX is imported.
os.environ.setdefault('XLA_PYTHON_CLIENT_MEM_FRACTION', '0.5')

import jax
import numpy as np

from alexnet_jax import command, files, machine, parallel, records
from alexnet_jax.errors import RunError, UsageError
from configs import ablation_lrn, alexnet, variant_torchvision
from experiments import limits, peers
from experiments.peers import Case, Contestant

RESULTS = Path(__file__).parent / 'results' / 'throughput'
PARTS = ('steps', 'layers', 'feeding', 'start')
KINDS = ('ours', 'naive', 'prototype', 'torch')
NETS: dict[str, tuple[Any, str]] = {
    '2012': (alexnet, 'imagenet2012'),
    '2012_without_LRN': (ablation_lrn, 'imagenet2012'),
    'torchvision': (variant_torchvision, 'imagenet2012'),
    'quickstart': (alexnet, 'quickstart'),
}
INPUTS = {  # of the part 'feeding'; the scale of configs/alexnet.py that reads each
    'quickstart': 'quickstart',
    'Fashion-MNIST at 224 px': 'fashion_mnist',
    '256 x 256 x 3 in array_record': 'imagenet2012',
}
BATCHES = {'cpu': (64, 128), 'gpu': (128, 1024)}
QUICKSTART_BATCH = 128  # its config's
SLOW = 1.5  # a form of PyTorch that takes so many times its best form's time sits out
Row = dict[str, Any]

# --------------------------------------------------------------------------------------- the clock


def alternate(
    makers: Mapping[str, Callable[[], Contestant]], rounds: int, sample_secs: float
) -> tuple[dict[str, Row], dict[str, np.ndarray]]:
    """Run contestants in turn; what cannot be made or run is a row that says why.

    Returns:
        {name: {'secs': [of a step, a value a round], 'cpu_secs': [...], 'steps': in a sample}} or
        {name: {'failed': sentence}}; and the last result of each, by name.
    """
    rows: dict[str, Row] = {}
    ready: dict[str, Contestant] = {}
    values: dict[str, np.ndarray] = {}
    for name, make in makers.items():
        try:
            ready[name], rows[name] = _warmed(make, sample_secs)
        except Exception as error:  # a peer's compiler may fail in any way; ours may not
            if not name.startswith('torch'):
                raise
            rows[name] = {'failed': f'{type(error).__name__}: {str(error).strip()[:200]}'}
    for number in range(rounds):
        if number:
            ready = {name: ready[name] for name in _in_the_race(rows)}
        gc.collect()
        for name in ready:
            values[name] = _sample(ready[name], rows[name])
    return rows, values


def _warmed(make: Callable[[], Contestant], sample_secs: float) -> tuple[Contestant, Row]:
    """Compiled and run twice; with the number of steps that fill a sample."""
    start = time.perf_counter()
    contestant = make()
    contestant.run(1)
    machine.keep_freed()
    first_secs = time.perf_counter() - start
    start = time.perf_counter()
    contestant.run(1)
    steps = max(1, round(sample_secs / (time.perf_counter() - start)))
    return contestant, {'first_secs': first_secs, 'steps': steps, 'secs': [], 'cpu_secs': []}


def _sample(contestant: Contestant, row: Row) -> np.ndarray:
    start, start_cpu = time.perf_counter(), time.process_time()
    result = contestant.run(row['steps'])
    row['secs'].append((time.perf_counter() - start) / row['steps'])
    row['cpu_secs'].append((time.process_time() - start_cpu) / row['steps'])
    return contestant.value(result)


def _in_the_race(rows: Mapping[str, Row]) -> list[str]:
    """All but the forms of PyTorch that were slow in the first round."""
    best = min((rows[name]['secs'][0] for name in _torch(rows)), default=0.0)
    return [
        name
        for name, row in rows.items()
        if 'secs' in row and not (name in _torch(rows) and row['secs'][0] > SLOW * best)
    ]


def _torch(rows: Mapping[str, Row]) -> list[str]:
    """The forms of PyTorch that run."""
    return [name for name, row in rows.items() if name.startswith('torch') and 'secs' in row]


def median(row: Row) -> float:
    """Seconds of a step."""
    return statistics.median(row['secs'])


def ratio(slow: Row, fast: Row) -> float:
    """How many times as fast: the median of the rounds' own ratios."""
    return statistics.median(a / b for a, b in zip(slow['secs'], fast['secs'], strict=False))


def best_torch(rows: Mapping[str, Row]) -> str | None:
    """The fastest form of PyTorch among those that ran in every round."""
    most = max((len(rows[name]['secs']) for name in _torch(rows)), default=0)
    whole = [name for name in _torch(rows) if len(rows[name]['secs']) == most]
    return min(whole, key=lambda name: median(rows[name])) if whole else None


# --------------------------------------------------------------------------------------- the steps


def measure(net: str, batch_size: int, dtype: str, what: str, flags: argparse.Namespace) -> Row:
    """One row of the part 'steps': every form of a net, in one pass, in turn."""
    module, scale = NETS[net]
    case = peers.case_of(module.get_config(scale), batch_size, dtype)
    makers = {
        name: make
        for name, make in peers.contestants(case, what, flags.kinds)
        if not any(word in name for word in flags.without)
        and (not flags.form or name in (flags.form, *KINDS))
    }
    makers |= {'product': lambda: limits.product(dtype), 'copy': limits.copying}
    rows, values = alternate(makers, flags.rounds, flags.sample_secs)
    rates = limits.rates(*(median(rows.pop(name)) for name in ('product', 'copy')))
    row = {'net': net, 'batch_size': batch_size, 'dtype': dtype, 'pass': what, 'forms': rows}
    row |= {
        'limit_secs': limits.step_secs(case.net, batch_size, what, rates),
        'flops': limits.step_flops(case.net, batch_size, what),
        'flops_per_sec': rates.flops,
        'bytes_per_sec': rates.bytes,
        'torch': None,
    }
    _check(row, values, case)
    if (best := best_torch(rows)) is not None:
        row['torch'] = best
    if 'ours' in rows:
        row['ratios'] = {
            name: ratio(rows[name], rows['ours'])
            for name in ('naive', 'prototype', best)
            if name in rows
        }
    return row | environment()


def _check(row: Row, values: Mapping[str, np.ndarray], case: Case) -> None:
    """That the forms compute the same: logits side by side; in training, that losses are finite."""
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


def steps(flags: argparse.Namespace) -> list[Row]:
    """All rows of the part."""
    rows = []
    for net in flags.nets:
        for batch_size, what in itertools.product(batches(net, flags), flags.passes):
            rows.append(measure(net, batch_size, flags.dtype, what, flags))
            say_row(rows[-1])
            keep(flags.out, 'steps', rows[-1:])
    return rows


def batches(net: str, flags: argparse.Namespace) -> tuple[int, ...]:
    """Images in a step of a net's rows."""
    if net == 'quickstart':
        return (QUICKSTART_BATCH,)
    return flags.batches or BATCHES[platform()]


DEVICES = 'JAX_NUM_CPU_DEVICES'


def apart(flags: argparse.Namespace, part: str) -> None:
    """A part, in processes of their own, each with a CPU shown as its trainer has it.

    Of the steps, PyTorch's forms among themselves, ours beside the best of them, then ours beside
    each other form of Flax: what several large programs allocate in turn costs XLA time, and a
    trainer has its process to itself.
    """
    if part == 'feeding':
        for name in flags.inputs:
            devices = alexnet.get_config(INPUTS[name]).mesh.cpu_devices
            _alone(flags, part, devices, f'--inputs={name}')
        return
    for net in flags.nets:
        module, scale = NETS[net]
        devices = module.get_config(scale).mesh.cpu_devices
        if part != 'steps':
            _alone(flags, part, devices, f'--nets={net}')
            continue
        for size, what in itertools.product(batches(net, flags), flags.passes):
            same = (f'--nets={net}', f'--batches={size}', f'--passes={what}')
            for words in _turns(flags, (net, size, flags.dtype, what)):
                _alone(flags, part, devices, *same, *words)


def _turns(flags: argparse.Namespace, name: tuple[Any, ...]) -> Iterator[tuple[str, ...]]:
    """Which forms of a row run beside each other, as flags."""
    ours, torch = '--kinds=ours', 'torch' in flags.kinds and peers.torch_is_here()
    if torch:
        yield ('--kinds=torch',)
        if 'ours' in flags.kinds:
            kept = read(_path(flags.out))['steps']
            best = next(row['torch'] for row in kept if _name('steps', row) == name)
            yield f'{ours},torch', f'--form={best}'
    others = [kind for kind in ('prototype', 'naive') if kind in flags.kinds]
    yield from ((f'{ours},{kind}',) for kind in others)
    if not torch and not others:
        yield (ours,)


def _alone(flags: argparse.Namespace, part: str, cpu_devices: int, *words: str) -> None:
    """This command again, for one part of it."""
    same = [f'--without={",".join(flags.without)}'] if flags.without else []
    if flags.batches and part != 'steps':
        same += [f'--batches={",".join(map(str, flags.batches))}']
    same += [f'--{key}={getattr(flags, key)}' for key in ('dtype', 'rounds', 'sample_secs', 'out')]
    own = [sys.executable, '-m', 'experiments.throughput', f'--parts={part}', *words, *same]
    devices = {DEVICES: str(max(1, cpu_devices))}
    if subprocess.run(own, env=os.environ | devices, check=False).returncode:
        raise RunError(f'{part} {" ".join(words)}: not measured; see above.')


def say_row(row: Row) -> None:
    """What was found, at once."""
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


# ----------------------------------------------------------------------------------------- the file

KEYS = {
    # What names a row of each part.
    'steps': ('net', 'batch_size', 'dtype', 'pass'),
    'layers': ('net', 'batch_size', 'dtype'),
    'feeding': ('input',),
    'start': ('config',),
}


def environment() -> Row:
    """Device, versions and commit; PyTorch's too."""
    found = records.environment()
    if peers.torch_is_here():
        import torch

        found |= {'torch_version': torch.__version__, 'torch_threads': torch.get_num_threads()}
    return found


def slug(device: str) -> str:
    """A device's name as a file's."""
    return re.sub(r'\W+', '_', device).strip('_').lower()


def read(path: Path) -> dict[str, list[Row]]:
    """The rows kept of a device, by part."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    return {part: kept.get(part, []) for part in PARTS}


def keep(folder: Path, part: str, rows: Sequence[Row]) -> Path:
    """Put rows among those of their device, in the place of those of the same name."""
    path = _path(folder)
    kept = read(path)
    named = {_name(part, row): row for row in kept[part]}
    for row in rows:
        named[_name(part, row)] = _joined(named.get(_name(part, row), {}), row)
    kept[part] = list(named.values())
    folder.mkdir(parents=True, exist_ok=True)
    with files.whole(path) as scratch:
        scratch.write_text(json.dumps(kept, indent=1) + '\n')
    return path


def _path(folder: Path) -> Path:
    return folder / f'{slug(records.device_name())}.json'


def _name(part: str, row: Row) -> tuple[Any, ...]:
    return tuple(row[key] for key in KEYS[part])


def _joined(old: Row, new: Row) -> Row:
    """A row of 'steps', run in several processes, joins what is kept of it of the same commit.

    Each ratio stays that of its own process; the figures of ours, and the limit, are those of the
    process in which it ran beside PyTorch.
    """
    same = old.get('commit') == new['commit'] and not new['commit'].endswith('+')  # '+': edited
    if not same or 'forms' not in new:
        return new
    first, other = (old, new) if _beside_torch(old) and not _beside_torch(new) else (new, old)
    merged = {key: other.get(key, {}) | first.get(key, {}) for key in ('forms', 'ratios')}
    return other | first | {key: found for key, found in merged.items() if found}


def _beside_torch(row: Row) -> bool:
    return bool(row['torch'] and 'ours' in row['forms'])


# -------------------------------------------------------------------------------------- the command


def platform() -> str:
    """'cpu' or 'gpu'."""
    return 'cpu' if jax.default_backend() == 'cpu' else 'gpu'


def _words(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def words(text: str) -> tuple[str, ...]:
        found = tuple(text.split(','))
        for word in found:
            if word not in known:
                raise argparse.ArgumentTypeError(f"'{word}' is not one of {', '.join(known)}")
        return found

    return words


def _parser() -> command.Parser:
    parser = command.Parser(
        prog='python -m experiments.throughput', description=(__doc__ or '').splitlines()[0]
    )
    add = parser.add_argument
    add('--parts', type=_words(PARTS), default=PARTS, help=', '.join(PARTS))
    add('--nets', type=_words(tuple(NETS)), default=tuple(NETS), help=', '.join(NETS))
    add('--inputs', type=_words(tuple(INPUTS)), default=tuple(INPUTS), help='of feeding')
    add('--batches', type=_numbers, default=(), help='64,128 on a CPU, 128,1024 on a GPU')
    add('--passes', type=_words(peers.PASSES), default=peers.PASSES, help='train,forward')
    add('--kinds', type=_words(KINDS), default=KINDS, help=', '.join(KINDS))
    add('--without', type=_some, default=(), help='forms of PyTorch to leave out: compiled,NCHW')
    add('--form', default='', help='the one form of PyTorch to run, as it is called in the tables')
    add('--dtype', choices=('float32', 'bfloat16'), help='float32 on a CPU, bfloat16 on a GPU')
    add('--rounds', type=int, default=5)
    add('--sample_secs', type=float, default=0.5, help='of each contestant in each round, about')
    add('--out', type=Path, default=RESULTS, help='where results are kept')
    add('--page', action='store_true', help='measure nothing: write tables and charts')
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(','))


def _some(text: str) -> tuple[str, ...]:
    return tuple(text.split(','))


def act(flags: argparse.Namespace) -> int:
    """Measure the parts asked for, keep them, and write the page."""
    from experiments import feeding, layers, throughput_page

    if flags.rounds < 1:
        raise UsageError('--rounds must be at least 1.')
    if not flags.page:
        parallel.set_up_cpu(0)  # as the trainer does, and before JAX looks at its devices
        on_cpu = platform() == 'cpu'
        flags.dtype = flags.dtype or ('float32' if on_cpu else 'bfloat16')
        measures = {
            'steps': steps,
            'layers': layers.measure_all,
            'feeding': feeding.feeding,
            'start': feeding.start,
        }
        for part in flags.parts:
            # 'start' starts processes anyway, which see the CPU as they like.
            if on_cpu and part != 'start' and DEVICES not in os.environ:
                apart(flags, part)
            else:
                measures[part](flags)
    throughput_page.write(flags.out)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command; see the head of the file."""
    return command.run('throughput', _parser, act, argv)


if __name__ == '__main__':
    sys.exit(main())
