"""Count what each of N devices sends, computes and stores per step: jaxpr, compiled program.

    python -m experiments.scaling            # the tables, from the stored rows
    python -m experiments.scaling --compile  # compile for 1 to 64 devices; store rows and tables

A CPU's XLA compiles the forms that accelerators get (`ops.traced_for`): a CPU's own forms of LRN
and convolution count some 10 % more operations, and not as many on every mesh.
"""

import argparse
from pathlib import Path
from typing import Any

import jax

from alexnet_jax import config
from alexnet_jax.analysis import communication
from alexnet_jax.config import Settings
from alexnet_jax.model import ops
from alexnet_jax.parallel import mesh
from configs import alexnet, variant_torchvision
from experiments.output import lines, markdown, read_lines, write_text
from experiments.throughput import roofline

RESULTS = Path(__file__).parent / 'results' / 'scaling'
STEPS, TABLES = (RESULTS / name for name in ('steps.jsonl', 'tables.md'))
IMAGES_A_DEVICE = 128
DEVICES = (1, 2, 4, 8, 16, 32, 64)
NETS = {
    '2012': 'the two-tower net of 2012 (configs/alexnet.py)',
    '2014': 'the one-tower net of 2014, 64-192-384-256-256 (configs/variant_torchvision.py)',
}
PLACEMENTS = {
    'data': 'towers, (N, 1): every device holds the complete net',
    'towers': 'towers, (N/2, 2): a tower a device',
    'one_weird_trick': 'one_weird_trick, (N, 1)',
}
Row = dict[str, Any]


def settings_of(net: str, placement: str, devices: int) -> Settings:
    """Return the settings of a net on that many devices."""
    source = {'2012': alexnet, '2014': variant_torchvision}[net].get_config('imagenet2012')
    tower = 2 if placement == 'towers' else 1
    name = 'one_weird_trick' if placement == 'one_weird_trick' else 'towers'
    source.mesh.update(data=devices // tower, tower=tower, placement=name)
    source.batch_size = IMAGES_A_DEVICE * devices
    return config.unpack(source)


def placements(net: str) -> list[str]:
    """Return the placements of a net; that of 2014 has one tower."""
    return [name for name in PLACEMENTS if (net, name) != ('2014', 'towers')]


def compile_step(net: str, placement: str, devices: int) -> Row:
    """Return a row of steps.jsonl: what one device computes, holds and sends in a step."""
    settings = settings_of(net, placement, devices)
    layout = mesh.make_layout(settings.mesh, settings.batch_size)
    with ops.traced_for('gpu'):
        found = communication.read_step(settings, layout)
    phases: dict[str, int] = {}
    for row in found.collectives:
        phases[row.phase] = phases.get(row.phase, 0) + row.sent_bytes
    return {
        'net': net,
        'placement': placement,
        'devices': devices,
        'flops': found.flops,
        'flops_by_hand': roofline.step_flops(settings.net, settings.batch_size, 'train') / devices,
        'bytes_accessed': found.bytes_accessed,
        'state_bytes': found.memory['state'],
        'sent_bytes': phases,
    }


def compile_all() -> list[Row]:
    """Compile every case on virtual CPU devices, before JAX has looked for devices."""
    jax.config.update('jax_num_cpu_devices', max(DEVICES))
    jax.config.update('jax_platforms', 'cpu')
    cases = [(net, 'data', 1) for net in NETS]  # on one device every placement is the same
    cases += [(net, name, n) for net in NETS for name in placements(net) for n in DEVICES[1:]]
    rows = []
    for case in cases:
        rows.append(compile_step(*case))
        print(*case, f'{_mib(sent(rows[-1]))} MiB sent', flush=True)
    return rows


def find(rows: list[Row], net: str, placement: str, devices: int) -> Row:
    """Return the row of a case; on one device every placement is the same."""
    key = (net, placement if devices > 1 else 'data', devices)
    (row,) = [row for row in rows if (row['net'], row['placement'], row['devices']) == key]
    return row


def sent(row: Row, *phases: str) -> int:
    """Return the bytes that each device sends in a step, or in some phases of it."""
    return sum(n for phase, n in row['sent_bytes'].items() if not phases or phase in phases)


def communication_table(rows: list[Row], net: str) -> str:
    """Return a table of MiB sent by each device in a step, the least in bold, and of its state."""
    known = placements(net)
    head = ['devices', *(f'{name}: sent' for name in known), *(f'{name}: state' for name in known)]
    body = []
    for devices in DEVICES[1:]:
        chosen = [find(rows, net, name, devices) for name in known]
        least, cells = min(map(sent, chosen)), []
        for row in chosen:
            bold = '**' * (sent(row) == least)
            activations, gradients = sent(row, 'forward', 'backward'), sent(row, 'gradient')
            cells.append(f'{_mib(activations)} + {_mib(gradients)} = {bold}{_mib(sent(row))}{bold}')
        body.append([devices, *cells, *(_mib(row['state_bytes']) for row in chosen)])
    return markdown([head, *body])


def flops_table(rows: list[Row]) -> str:
    """Return a table of XLA's count of operations and the count by hand, on one device."""
    body = []
    for net, name in NETS.items():
        row = find(rows, net, 'data', 1)
        counts = row['flops'], row['flops_by_hand'], row['bytes_accessed']
        body.append([name, *(f'{count / 1e9:.1f}' for count in counts)])
    head = ['net', "GFLOP, XLA's count", 'GFLOP by hand', "GB read and written, XLA's count"]
    return markdown([head, *body])


def _mib(size: float) -> str:
    return f'{size / 2**20:.1f}'


def tables(rows: list[Row]) -> str:
    """Return the text of tables.md."""
    parts = [
        '# Scaling: what each device sends and computes',
        'Written by `python -m experiments.scaling --compile`: bytes sent from the jaxpr, the rest '
        'from the compiled program; speed on several accelerators was not measured. Weak scaling, '
        f'{IMAGES_A_DEVICE} images per device, float32. Placements: '
        + '; '.join(f'`{key}` is {text}' for key, text in PLACEMENTS.items())
        + '.',
        '## MiB that each device sends in a step (activations + gradients), and its parameters and '
        'velocity',
    ]
    for net, name in NETS.items():
        parts += [f'Net: {name}.', communication_table(rows, net)]
    parts += [
        '## Operations of a step on one device',
        'By hand: two per multiply-add, three passes (two for conv1). The count by hand includes '
        "products with the zeros of the padding, XLA's does not.",
        flops_table(rows),
    ]
    return '\n\n'.join(parts) + '\n'


def main() -> None:
    """Compile or read the rows, and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
    what = 'compile the steps again (takes minutes)'
    parser.add_argument('--compile', action='store_true', help=what)
    if parser.parse_args().compile:
        rows = compile_all()
        write_text(STEPS, lines(rows))
        write_text(TABLES, tables(rows))
    print(tables(read_lines(STEPS)))


if __name__ == '__main__':
    main()
