"""Measure how far loss curves of one run differ between meshes and placements.

    python -m experiments.meshes [--steps=100]

Each row is compared with one device. The last one shows how far a rounding error grows: one device
with every weight of conv1 changed by one unit in the last place.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from alexnet_jax import config
from alexnet_jax.model import alexnet
from alexnet_jax.training import job as jobs
from alexnet_jax.training import metrics as run_metrics
from alexnet_jax.training import step
from configs import smoke
from experiments.output import lines, write_text

RESULTS = Path(__file__).parent / 'results' / 'meshes.jsonl'
ROUNDING = 'one device, conv1 off by a rounding error'
ROWS = {
    'towers 1 x 1': (1, 1, 'towers'),
    'towers 1 x 2': (1, 2, 'towers'),
    'towers 2 x 1': (2, 1, 'towers'),
    'towers 2 x 2': (2, 2, 'towers'),
    'towers 4 x 2': (4, 2, 'towers'),
    'towers 8 x 1': (8, 1, 'towers'),
    'one weird trick on 2': (2, 1, 'one_weird_trick'),
    'one weird trick on 8': (8, 1, 'one_weird_trick'),
    ROUNDING: (1, 1, 'towers'),
}
RATES = {'recipe': 1.0, 'hundredth': 0.01}


def open_row(row: str, factor: float) -> tuple[jobs.Job, step.TrainState]:
    """Return a run and its initial state."""
    chosen = smoke.get_config()
    data, tower, placement = ROWS[row]
    chosen.mesh.update(data=data, tower=tower, placement=placement)
    chosen.epochs = 100.0
    for kind in ('weights', 'biases'):
        chosen.optimizer[kind].rate *= factor
    job = jobs.open_job(config.unpack(chosen), Path())
    start = job.start()
    if row == ROUNDING:
        conv1 = start.params['conv1']
        nudged = jnp.nextafter(conv1['kernel'], jnp.full_like(conv1['kernel'], jnp.inf))
        start = start.replace(params=start.params | {'conv1': conv1 | {'kernel': nudged}})
    return job, start


def gradients(job: jobs.Job, state: step.TrainState) -> tuple[float, dict]:
    """Return loss and gradients of the first step."""
    forward = job.layout.forward(job.settings.net)

    @jax.jit
    def run(state, batch, statistics):
        pixels, masks = step.inputs(job.settings, len(job.train), state, batch, statistics)
        return jax.value_and_grad(
            lambda params: alexnet.mean_loss(forward(params, pixels, masks), batch['label'])
        )(state.params)

    loss, grads = run(state, job.batch(0), job.statistics)
    return float(loss), jax.device_get(grads)


def curve(job: jobs.Job, state: step.TrainState, steps: int) -> tuple[np.ndarray, dict]:
    """Return the loss of each step, and the parameters after the first."""
    losses, first = [], {}
    for number in range(steps):
        state, metrics = job.train_step(state, job.batch(number), job.statistics)
        total, count = jax.device_get(metrics['loss'])  # waits: eight devices share few cores
        losses.append(float(total) / float(count))
        first = first or jax.device_get(state.params)
    return np.array(losses), first


def distance(ours: dict, reference: dict) -> float:
    """Return the largest difference in any leaf, relative to its largest entry."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True)
    return max(float(np.max(np.abs(a - b)) / np.max(np.abs(b))) for a, b in pairs)


def main() -> None:
    """Measure, print and store every row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--steps', type=int, default=100)
    steps = parser.parse_args().steps
    jax.config.update('jax_num_cpu_devices', 8)
    records, references = [], {}
    for row in ROWS:
        record = {'row': row, 'steps': steps}
        for rate, factor in RATES.items():
            job, state = open_row(row, factor)
            loss, grads = gradients(job, state)
            losses, params = curve(job, state, steps)
            ours = references.setdefault(rate, (loss, grads, losses, params))
            if rate == 'recipe':
                record['loss'] = abs(loss - ours[0]) / ours[0]
                record['gradients'] = distance(grads, ours[1])
                record['parameters'] = distance(params, ours[3])
            record[f'curve_{rate}'] = float(np.max(np.abs(losses - ours[2])))
        print(record, flush=True)
        records.append(record | run_metrics.environment())
    write_text(RESULTS, lines(records))


if __name__ == '__main__':
    main()
