"""Measure the spread of logits across images at initialisation, by recipe, width and init.

    python -m experiments.preflight [--seeds=3]

For the recipe as run and as written, at both of its scales, with and without init scaled by fan-in.
"""

import argparse
import statistics
from pathlib import Path

from alexnet_jax import config
from alexnet_jax.model import alexnet as model
from alexnet_jax.training import job as jobs
from alexnet_jax.training import metrics, preflight, step
from configs import alexnet, alexnet_paper
from experiments.output import lines, write_text

RESULTS = Path(__file__).parent / 'results' / 'preflight.jsonl'
RECIPES = {'as run': alexnet, 'as written': alexnet_paper}
ROWS = (
    # (recipe, scale, model.init_scaling, what the pixels are multiplied by)
    ('as run', 'fashion_mnist', 'fan_in', 1.0),
    ('as run', 'quickstart', 'fan_in', 1.0),
    ('as run', 'quickstart', 'none', 1.0),
    ('as written', 'fashion_mnist', 'fan_in', 1.0),
    ('as written', 'quickstart', 'fan_in', 1.0),
    ('as written', 'quickstart', 'none', 1.0),
    ('as written', 'quickstart', 'none', 1 / 255),
)


def measure(recipe: str, scale: str, init_scaling: str, factor: float, seed: int) -> float:
    """Return the standard deviation of the logits of one initialisation."""
    chosen = RECIPES[recipe].get_config(scale)
    chosen.seed, chosen.model.init_scaling, chosen.preprocess.scale = seed, init_scaling, factor
    chosen.mesh.data = 1
    settings = config.unpack(chosen)
    job = jobs.open_job(settings, Path())
    params = model.init(step.init_key(step.seed_of(settings)), settings.net)
    found = preflight.signal(settings.net, params, jobs.first_crops(job))
    return found[settings.net.layers[-1].name]


def main() -> None:
    """Measure, print and store every row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--seeds', type=int, default=3)
    seeds = range(parser.parse_args().seeds)
    records = []
    for row in ROWS:
        found = [measure(*row, seed=seed) for seed in seeds]
        record = dict(zip(('recipe', 'scale', 'init_scaling', 'factor'), row, strict=True))
        print(*row, f'median {statistics.median(found):.1e}', sep=' | ')
        records.append(record | {'logit_std': found} | metrics.environment())
    write_text(RESULTS, lines(records))


if __name__ == '__main__':
    main()
