"""How fast would N devices be? An estimate from the compiled step's own operations and bytes.

    python -m experiments.scaling                    # the tables, from what was compiled before
    python -m experiments.scaling --compile --save   # compiled anew for 1 to 64 devices, and kept
    python -m experiments.scaling --net=2012 --single_secs=0.02 --flops=67e12 --memory=3.35e12 \\
        --link=450e9 --island=8 --far=0.11           # another machine

Weak scaling, 128 images a device. A step takes

    max(FLOPs / (fraction * peak), bytes / memory bandwidth)  +  sum over messages of
    hops * latency + bytes sent / link bandwidth

with FLOPs, bytes and messages of one device read off XLA's program (alexnet_jax/communication.py),
messages in rings (n - 1 hops; an all-reduce twice that), and `fraction` from the time of a step on
one device alone. No message hides behind computation, or, the other bound, all of them do.

The program is compiled by a CPU's XLA from the forms that accelerators get (`accelerator_forms`):
a CPU's own forms of LRN and convolution count some 10 % more operations, and not as many on every
mesh. Bytes read and written are those between operations as a CPU's XLA has fused them.
"""

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import jax

from alexnet_jax import communication, config, ops, parallel
from alexnet_jax.config import Settings
from alexnet_jax.model import geometry
from configs import alexnet, variant_torchvision

RESULTS = Path(__file__).parent / 'results' / 'scaling'
STEPS, TABLES = (RESULTS / name for name in ('steps.jsonl', 'tables.md'))
IMAGES_A_DEVICE = 128
DEVICES = (1, 2, 4, 8, 16, 32, 64)
NETS = {
    '2012': 'the two-tower net of 2012 (configs/alexnet.py)',
    '2014': 'the one-tower net of 2014, 64-192-384-256-256 (configs/variant_torchvision.py)',
}
PLACEMENTS = {
    'data': 'towers, (N, 1): every device holds the whole net',
    'towers': 'towers, (N/2, 2): a tower a device',
    'one_weird_trick': 'one_weird_trick, (N, 1)',
}

# --------------------------------------------------------------------------- what was published


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices and what joins them; an island is a group of devices joined at the full rate.

    fraction: of the peak that one device reaches on its own; measured on one device.
    """

    flops: float  # a second, peak
    memory: float  # bytes a second
    link: float  # bytes a second that a device sends while all do
    latency: float  # seconds a hop
    island: int  # devices
    far: float  # share of `link` that is left where a ring leaves its island
    fraction: float = 1.0


# Peak and memory: data sheet of NVIDIA's Tesla K20 (3.52 TFLOP/s, 208 GB/s). Link and islands:
# Krizhevsky (2014), arXiv 1404.5997, section 4, from memory, not verified: eight K20, four behind
# each PCI Express 2.0 switch; about 6 GB/s among the four at once, half of it across the two sets
# where all talk. Latency: assumed; ten times as much takes 3 % from the speedup of eight.
K20 = Machine(flops=3.52e12, memory=208e9, link=6e9, latency=20e-6, island=4, far=0.5)
# arXiv 1404.5997, table 1, from memory, not verified: 90 epochs of ILSVRC-2012 in 98.05 h on one
# GPU, in batches of 128. (It agrees with the speedups below and the table's hours on 2, 4 and 8
# GPUs; a third party calls it a total. The manual of his cuda-convnet2, TrainingExample.md, shows
# 8.4 s for 1/418 of an epoch on a GPU that is not named, 0.35 s a batch without the tests.)
K20_HOURS, EPOCHS_2014 = 98.05, 90
K20_STEP_SECS = K20_HOURS * 3600 * IMAGES_A_DEVICE / (EPOCHS_2014 * communication.IMAGES)
PUBLISHED = {2: 1.95, 4: 3.74, 8: 6.25}  # the same table; batches of 128 a GPU, as here

# ------------------------------------------------------------------------------ the compiled steps


def settings_of(net: str, placement: str, devices: int) -> Settings:
    """The config of a net on that many devices."""
    source = {'2012': alexnet, '2014': variant_torchvision}[net].get_config('imagenet2012')
    tower = 2 if placement == 'towers' else 1
    name = 'one_weird_trick' if placement == 'one_weird_trick' else 'towers'
    source.mesh.update(data=devices // tower, tower=tower, placement=name)
    source.batch_size = IMAGES_A_DEVICE * devices
    return config.unpack(source)


def cases() -> Iterator[tuple[str, str, int]]:
    """(net, placement, devices) of every step that is compiled."""
    for net in NETS:
        for placement in PLACEMENTS:
            if net == '2014' and placement == 'towers':
                continue  # it has one tower
            for devices in DEVICES:
                if devices > 1 or placement == 'data':
                    yield net, placement, devices


def compile_step(net: str, placement: str, devices: int) -> dict[str, Any]:
    """One row of steps.jsonl: what one device computes, holds and sends in a step."""
    settings = settings_of(net, placement, devices)
    layout = parallel.lay_out(settings.mesh, settings.batch_size)
    with accelerator_forms():
        found = communication.read_step(settings, layout)
    messages: dict[str, dict[str, Any]] = {}
    for row in found.collectives:
        message = messages.setdefault(
            row.instruction,
            {'kind': row.kind, 'axis': row.axis, 'devices': row.devices, 'phases': {}},
        )
        phase = row.phase or communication.BOOKKEEPING
        message['phases'][phase] = message['phases'].get(phase, 0) + row.sent_bytes
    held = found.memory
    return {
        'net': net,
        'placement': placement,
        'devices': devices,
        'flops': found.flops,
        'flops_by_hand': flops_by_hand(settings) / devices,
        'bytes_accessed': found.bytes_accessed,
        'state_bytes': sum(held.parameters.values()) + sum(held.velocity.values()),
        'activation_bytes': sum(held.activations.values()),
        'messages': list(messages.values()),
    }


@contextlib.contextmanager
def accelerator_forms() -> Generator[None]:
    """Programs traced in this context are made of the operations that a GPU or TPU gets."""
    on_cpu = ops._on_cpu
    try:
        ops._on_cpu = lambda: False
        yield
    finally:
        ops._on_cpu = on_cpu


def flops_by_hand(settings: Settings) -> int:
    """Two a multiply-add, forward and twice backward; the first layer needs no input gradient."""
    first, *rest = [stage.multiply_adds for stage in geometry(settings.net)]
    return 2 * settings.batch_size * (2 * first + 3 * sum(rest))


def compile_all() -> list[dict[str, Any]]:
    """Every case, on virtual CPU devices; in a process that has asked for no device yet."""
    jax.config.update('jax_num_cpu_devices', max(DEVICES))
    jax.config.update('jax_platforms', 'cpu')
    rows = []
    for case in cases():
        rows.append(compile_step(*case))
        print(*case, f'{sent(rows[-1]) / 2**20:.1f} MiB sent', flush=True)
    return rows


def read() -> list[dict[str, Any]]:
    """The rows that were kept."""
    return [json.loads(line) for line in STEPS.read_text().splitlines()]


def find(rows: list[dict[str, Any]], net: str, placement: str, devices: int) -> dict[str, Any]:
    """The row of a case; on one device every placement is the same."""
    key = (net, placement if devices > 1 else 'data', devices)
    (row,) = [row for row in rows if (row['net'], row['placement'], row['devices']) == key]
    return row


def sent(row: dict[str, Any], *phases: str) -> int:
    """Bytes that each device sends in a step; of some phases only."""
    return sum(
        size
        for message in row['messages']
        for phase, size in message['phases'].items()
        if not phases or phase in phases
    )


# --------------------------------------------------------------------------------- the estimate


def compute_secs(row: dict[str, Any], machine: Machine) -> float:
    """What a device needs for its own part of a step."""
    operations = row['flops'] / (machine.fraction * machine.flops)
    return max(operations, row['bytes_accessed'] / machine.memory)


def message_secs(row: dict[str, Any], machine: Machine) -> float:
    """What a device needs to send its messages, one after the other."""
    total = 0.0
    for message in row['messages']:
        hops = (message['devices'] - 1) * (2 if message['kind'] == 'all-reduce' else 1)
        # Towers are neighbours; along 'data' a ring goes through the whole machine.
        span = row['devices'] if 'data' in message['axis'] else message['devices']
        link = machine.link * (machine.far if span > machine.island else 1.0)
        total += hops * machine.latency + sum(message['phases'].values()) / link
    return total


def calibrated(machine: Machine, single: dict[str, Any], single_secs: float) -> Machine:
    """The machine with the fraction of its peak that a step on one device shows."""
    return dataclasses.replace(machine, fraction=single['flops'] / (machine.flops * single_secs))


def predict(rows: list[dict[str, Any]], net: str, machine: Machine) -> list[dict[str, Any]]:
    """Step time, speedup and efficiency of every placement and number of devices."""
    alone = compute_secs(find(rows, net, 'data', 1), machine)
    found = []
    for row in rows:
        if row['net'] == net:
            computing, sending = compute_secs(row, machine), message_secs(row, machine)
            steps = {'apart': computing + sending, 'overlapped': max(computing, sending)}
            speedups = {name: row['devices'] * alone / secs for name, secs in steps.items()}
            found.append(
                {
                    'placement': row['placement'],
                    'devices': row['devices'],
                    'compute_secs': computing,
                    'message_secs': sending,
                    'speedup': speedups,
                    'efficiency': {k: v / row['devices'] for k, v in speedups.items()},
                }
            )
    return found


# ----------------------------------------------------------------------------------- the tables

# A machine to show the placements on: data sheet of the H100 SXM (67 TFLOP/s in float32 outside
# the tensor cores, 3.35 TB/s, NVLink 450 GB/s each way among eight), 50 GB/s a device between
# machines (a 400 Gbit/s adapter each). The fraction is assumed. Nothing of it was measured.
H100 = Machine(
    flops=67e12, memory=3.35e12, link=450e9, latency=5e-6, island=8, far=50 / 450, fraction=0.5
)


def communication_table(rows: list[dict[str, Any]], net: str) -> str:
    """MiB that each device sends in a step, the least in bold, and what its state takes."""
    known = [name for name in PLACEMENTS if any(_is(row, net, name) for row in rows)]
    head = ['devices', *(f'{name}: sent' for name in known), *(f'{name}: state' for name in known)]
    body = []
    for devices in DEVICES[1:]:
        chosen = [find(rows, net, name, devices) for name in known]
        least = min(map(sent, chosen))
        cells = []
        for row in chosen:
            total = f'**{_mib(sent(row))}**' if sent(row) == least else _mib(sent(row))
            activations, gradients = sent(row, 'forward', 'backward'), sent(row, 'gradient')
            cells.append(f'{_mib(activations)} + {_mib(gradients)} = {total}')
        body.append([str(devices), *cells, *(_mib(row['state_bytes']) for row in chosen)])
    return markdown([head, *body])


def k20_table(found: list[dict[str, Any]]) -> str:
    """The published speedups and the predicted ones."""
    head = [
        'GPUs', 'published', 'predicted', 'off by', 'if all messages were hidden', 'off by',
        'predicted for data parallelism alone',
    ]  # fmt: skip
    body = []
    for devices, published in PUBLISHED.items():
        trick, data = (
            next(r for r in found if (r['placement'], r['devices']) == (name, devices))
            for name in ('one_weird_trick', 'data')
        )
        row = [str(devices), f'{published:.2f}x']
        for bound in ('apart', 'overlapped'):
            speedup = trick['speedup'][bound]
            row += [f'{speedup:.2f}x', f'{100 * (speedup / published - 1):+.0f} %']
        body.append([*row, f'{data["speedup"]["apart"]:.2f}x'])
    return markdown([head, *body])


def speedup_table(found: list[dict[str, Any]]) -> str:
    """Step time and efficiency of each placement, between the two bounds."""
    head = ['devices', 'placement', 'computing, ms', 'sending, ms', 'speedup', 'efficiency']
    body = []
    for row in sorted(found, key=lambda row: row['devices']):
        low, high = row['speedup']['apart'], row['speedup']['overlapped']
        speedup, efficiency = f'{low:.2f}x to {high:.2f}x', row['efficiency']
        body.append(
            [
                str(row['devices']),
                row['placement'] if row['devices'] > 1 else '-',
                f'{1e3 * row["compute_secs"]:.1f}',
                f'{1e3 * row["message_secs"]:.1f}',
                speedup if row['devices'] > 1 else '1',
                f'{efficiency["apart"]:.0%} to {efficiency["overlapped"]:.0%}',
            ]
        )
    return markdown([head, *body])


def flops_table(rows: list[dict[str, Any]]) -> str:
    """XLA's count of operations beside the count by hand, on one device."""
    body = []
    for net, name in NETS.items():
        row = find(rows, net, 'data', 1)
        counts = row['flops'], row['flops_by_hand'], row['bytes_accessed']
        body.append([name, *(f'{count / 1e9:.1f}' for count in counts)])
    head = ['net', "GFLOP, XLA's count", 'GFLOP by hand', "GB read and written, XLA's count"]
    return markdown([head, *body])


def markdown(rows: list[list[str]]) -> str:
    """A table of it, the first row its head."""
    lines = ['| ' + ' | '.join(row) + ' |' for row in rows]
    return '\n'.join([lines[0], '|' + '---|' * len(rows[0]), *lines[1:]])


def _is(row: dict[str, Any], net: str, placement: str) -> bool:
    return (row['net'], row['placement']) == (net, placement)


def _mib(size: float) -> str:
    return f'{size / 2**20:.1f}'


def tables(rows: list[dict[str, Any]]) -> str:
    """All of tables.md."""
    k20 = calibrated(K20, find(rows, '2014', 'data', 1), K20_STEP_SECS)
    parts = [
        '# Scaling: what is sent, and how fast it would be',
        'Written by `python -m experiments.scaling --compile --save`; the model and its '
        'assumptions stand at the head of `experiments/scaling.py`. Nothing here is a measured '
        f'speed but the published column. Weak scaling, {IMAGES_A_DEVICE} images a device, float32.'
        ' Placements: ' + '; '.join(f'`{key}` is {text}' for key, text in PLACEMENTS.items()) + '.',
        '## MiB that each device sends in a step (activations + gradients), and its parameters and '
        'velocity',
    ]
    for net, name in NETS.items():
        parts += [f'Net: {name}.', communication_table(rows, net)]
    parts += [
        '## Held against eight K20 (Krizhevsky, 2014, table 1)',
        f'One GPU: {1e3 * K20_STEP_SECS:.1f} ms a step of {IMAGES_A_DEVICE} ({K20_HOURS} h for '
        f'{EPOCHS_2014} epochs), {k20.fraction:.0%} of the peak: the only figure that the model is '
        'given. Net: ' + NETS['2014'] + '.',
        k20_table(predict(rows, '2014', k20)),
        'Not modelled: a smaller share of the peak in the narrower products of fully connected '
        'layers, copies by way of the host, what the host does for eight GPUs at once. Link and '
        'islands, and the hours of one GPU, are from memory of the paper and not verified.',
        '## A machine of today: assumed, not measured',
        f'{H100.flops / 1e12:g} TFLOP/s, half of it reached; {H100.memory / 1e12:g} TB/s; '
        f'{H100.link / 1e9:g} GB/s among {H100.island} devices, {H100.link * H100.far / 1e9:g} GB/s'
        f' beyond. Net: {NETS["2012"]}.',
        speedup_table(predict(rows, '2012', H100)),
        '## Operations of a step on one device',
        "XLA's count is used. By hand, two a multiply-add, three passes (conv1 two): products with "
        'the zeros of the padding are counted there, and not by XLA.',
        flops_table(rows),
    ]
    return '\n\n'.join(parts) + '\n'


# ---------------------------------------------------------------------------------- the command


def machine_of(flags: argparse.Namespace, rows: list[dict[str, Any]]) -> Machine:
    """The K20's figures, and what the flags say otherwise."""
    names = [field.name for field in dataclasses.fields(Machine)]
    said = {name: value for name in names if (value := getattr(flags, name)) is not None}
    machine = dataclasses.replace(K20, **said)
    if flags.fraction is not None:
        return machine
    single_secs = flags.single_secs or K20_STEP_SECS
    return calibrated(machine, find(rows, flags.net, 'data', 1), single_secs)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--net', choices=NETS, default='2014')
    parser.add_argument('--compile', action='store_true', help='compile the steps anew: minutes')
    parser.add_argument('--save', action='store_true', help=f'write {RESULTS.name}/')
    parser.add_argument('--single_secs', type=float, help='a step on one device (K20: 0.392)')
    for field in dataclasses.fields(Machine):
        default = getattr(K20, field.name)
        text = f'K20: {default:g}' if field.name != 'fraction' else 'from single_secs'
        kind = int if field.name == 'island' else float
        parser.add_argument(f'--{field.name}', type=kind, help=text)
    return parser.parse_args()


def main() -> None:
    """Compile or read, predict, print and, where asked, keep."""
    flags = parse()
    rows = compile_all() if flags.compile else read()
    machine = machine_of(flags, rows)
    print(f'{NETS[flags.net]}, {IMAGES_A_DEVICE} images a device, on {machine}\n')
    print(speedup_table(predict(rows, flags.net, machine)))
    if flags.save:
        RESULTS.mkdir(parents=True, exist_ok=True)
        STEPS.write_text(''.join(json.dumps(row) + '\n' for row in rows))
        TABLES.write_text(tables(rows))


if __name__ == '__main__':
    main()
