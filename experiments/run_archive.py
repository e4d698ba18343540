"""Archive finished runs in the repository: small, but sufficient to compare them.

    <run>/config.json, environment.json, metrics.jsonl (a training record an epoch), wrong.json

wrong.json has one bit per image, for one view and ten and for top-1 and top-5: whether the net
missed it. It also has the sha256 of the labels, so that only runs on the same images are compared.
A run that ended with infinite numbers has an empty file `diverged` instead. `ensembles.jsonl`
beside the runs has the same for ensembles of a row's seeds.
"""

import argparse
import base64
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alexnet_jax import command, config_file
from alexnet_jax.command import log
from alexnet_jax.errors import RunError
from alexnet_jax.inference import evaluate
from alexnet_jax.training import metrics
from experiments.output import lines, read_lines, short_commit, write_text
from experiments.sweep import finished

MEASURES = {'top1_error': 1, 'top5_error': 5}
ENSEMBLES = (2, 3, 5)  # sizes, besides that of all seeds
Missed = dict[str, dict[str, np.ndarray]]  # view, measure -> bool [N]
Record = Mapping[str, Any]
Keep = Callable[[Sequence[Record]], Sequence[Record]]  # which records are archived
Archived = tuple[Path, dict[tuple[str, int], Path]]


@dataclasses.dataclass(frozen=True, eq=False)
class ArchivedRun:
    """A run read from the archive."""

    row: str
    seed: int
    config: dict[str, Any]
    environment: dict[str, Any]
    records: list[dict[str, Any]]
    wrong: Missed  # {} where no predictions were archived
    labels_sha256: str

    def final(self) -> Any:
        """Return its last record of all test images (an extended run has several), or None."""
        tests = (record for record in reversed(self.records) if record['kind'] == 'test')
        return next(tests, None)

    def accuracy(self, view: str) -> float:
        """Return its test accuracy."""
        return 1 - self.final()[view]['top1_error']


# ----------------------------------------------------------------------------------------- archive


def thinned(found: Sequence[Record]) -> list[Record]:
    """Return validation and test records, and the training record before each validation."""
    kinds = [record['kind'] for record in found[1:]] + ['']
    pairs = zip(found, kinds, strict=True)
    return [r for r, after in pairs if r['kind'] != 'train' or after == 'validation']


def archive(workdir: Path, folder: Path, keep: Keep = thinned) -> None:
    """Archive a run that has ended: its logs, as `keep` leaves them, and which images it missed."""
    run = read_run(workdir)
    contents = {
        'config.json': json.dumps(portable_config(workdir), indent=2, sort_keys=True) + '\n',
        'environment.json': (workdir / 'environment.json').read_text(),
        'metrics.jsonl': lines(keep(run.records)),
    }
    if finished(workdir):
        contents['wrong.json'] = lines([_missed_by(workdir, run)])
    else:
        contents['diverged'] = ''
    for name in ('wrong.json', 'diverged'):  # the code may have changed since the last time
        (folder / name).unlink(missing_ok=True)
    for name, text in contents.items():
        write_text(folder / name, text)


def _missed_by(workdir: Path, run: ArchivedRun) -> Record:
    arrays = evaluate.load_predictions(workdir)
    wrong = missed(arrays)
    for view, measure in itertools.product(evaluate.VIEWS, MEASURES):
        if float(np.mean(wrong[view][measure])) != run.final()[view][measure]:
            raise RunError(
                f'{workdir}/predictions_test.npz is not from the end of the run (its {measure} '
                f'differs from metrics.jsonl); make it with --mode=evaluate --step=latest.'
            )
    return packed(wrong, arrays['label'])


def archive_all(
    folder: Path, results: Path, rows: Container[str], keep: Keep = thinned
) -> Archived:
    """Archive every ended run in a sweep's folder whose row is in `rows`.

    Return the archive's folder, results/<scale>, and the finished workdirs by row and seed.
    """
    found = {}
    for path in sorted(file.parent for file in folder.glob('*/metrics.jsonl')):
        row, seed = name_of(path)
        if row not in rows:
            log(f'{path} is not a run of the table, and is skipped.')
        elif finished(path) or diverged(path):
            found[row, seed] = path
        else:
            log(f'{path} is not finished, and is skipped.')
    scales = {portable_config(path)['scale'] for path in found.values()}
    if len(scales) != 1:
        what = f'runs of {len(scales)} scales' if scales else 'no finished run'
        raise RunError(f'{folder} contains {what}; build the table from one sweep at one scale.')
    target = results / scales.pop()
    for path in found.values():
        archive(path, target / path.name, keep)
    return target, {key: path for key, path in found.items() if finished(path)}


def name_of(folder: Path) -> tuple[str, int]:
    """Return row and seed of a run's folder; ('', 0) for a folder of another name."""
    row, _, seed = folder.name.rpartition('-')
    return (row, int(seed)) if seed.isdigit() else ('', 0)


def diverged(workdir: Path) -> bool:
    """Return whether a run of a sweep ended with infinite numbers."""
    log = workdir / 'log.txt'
    return log.exists() and 'is not finite' in log.read_text(errors='replace')


def missed(arrays: Mapping[str, np.ndarray]) -> Missed:
    """Return which images were missed, ranked as in evaluate.scores."""
    ranks = {view: evaluate.ranks(arrays[view], arrays['label']) for view in evaluate.VIEWS}
    return {v: {measure: rank >= k for measure, k in MEASURES.items()} for v, rank in ranks.items()}


def portable_config(workdir: Path) -> dict[str, Any]:
    """Return a run's config without the folders of the machine it ran on."""
    config = config_file.read_json(workdir / 'config.json')
    config['data']['data_dir'], config['loop']['compilation_cache'] = 'data', 'beside'
    return config


def packed(wrong: Missed, label: np.ndarray) -> dict[str, Any]:
    """Return the content of wrong.json."""
    bits = {
        view: {m: base64.b64encode(np.packbits(own[m]).tobytes()).decode() for m in MEASURES}
        for view, own in wrong.items()
    }
    sha256 = hashlib.sha256(label.astype('<i4').tobytes()).hexdigest()
    return {'images': len(label), 'labels_sha256': sha256, 'wrong': bits}


def archive_ensembles(workdirs: Mapping[int, Path], path: Path) -> None:
    """Write which images are missed by ensembles of a row's seeds, their probabilities averaged.

    For each size in ENSEMBLES there are as many ensembles as seeds, of seeds that follow each other
    in a circle, so that every seed counts as often. Ensembles of other seeds in the file stay.
    """
    arrays = {seed: evaluate.load_predictions(own) for seed, own in sorted(workdirs.items())}
    found = [own for own in read_lines(path) if not {*own['seeds']} & {*workdirs}]
    order, total = [*arrays] * 2, len(arrays)
    for count in sorted({*ENSEMBLES, total} & {*range(2, total + 1)}):
        for seeds in dict.fromkeys(tuple(sorted(order[i : i + count])) for i in range(total)):
            members = [arrays[seed] for seed in seeds]
            mean = {view: np.mean([m[view] for m in members], axis=0) for view in evaluate.VIEWS}
            label = members[0]['label']
            found.append({'seeds': seeds, **packed(missed({'label': label, **mean}), label)})
    write_text(path, lines(found))


# -------------------------------------------------------------------------------------------- read


def read(folder: Path, predictions: bool = True) -> list[ArchivedRun]:
    """Return all archived runs of results/<scale>; with `predictions`, those with wrong.json."""
    found = folder.glob('*/wrong.json' if predictions else '*/metrics.jsonl')
    ended = (path.parent for path in found if not (path.parent / 'diverged').exists())
    runs = [read_run(path) for path in sorted(ended, key=name_of)]
    if not runs:
        raise RunError(f'no run is archived in {folder}; give the workdirs of a sweep with --runs.')
    for run in runs:
        if run.final() is None:
            raise RunError(f'{folder}/{run.row}-{run.seed} is damaged (no test record).')
    scales = {run.config['scale'] for run in runs}
    labels = {run.labels_sha256 for run in runs} - {''}
    for what, values in (('scales', scales), ('test images', labels)):
        if len(values) > 1:
            raise RunError(f'the runs in {folder} are of {len(values)} {what}; separate them.')
    return runs


def read_run(folder: Path) -> ArchivedRun:
    """Return the run of a folder, archived or not."""
    try:
        (own,) = read_lines(folder / 'wrong.json') or ({},)
        return ArchivedRun(
            *name_of(folder),
            config=config_file.read_json(folder / 'config.json'),
            environment=json.loads((folder / 'environment.json').read_text()),
            records=metrics.read(folder),
            wrong=unpacked(own) if own else {},
            labels_sha256=own['labels_sha256'] if own else '',
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f'{folder} is damaged ({error!r}); archive the run again.') from error


def unpacked(own: Record) -> Missed:
    """Return the arrays that `packed` was given."""

    def bits(text: str) -> np.ndarray:
        raw = np.frombuffer(base64.b64decode(text, validate=True), np.uint8)
        return np.unpackbits(raw)[: own['images']].astype(bool)

    return {v: {m: bits(own['wrong'][v][m]) for m in MEASURES} for v in evaluate.VIEWS}


def trained_on(runs: Sequence[ArchivedRun]) -> str:
    """Return 'on DEVICES; commit COMMITS' of some runs."""
    devices = ', '.join(sorted({run.environment['device'] for run in runs}))
    commits = ', '.join(sorted({short_commit(run.environment['commit']) for run in runs}))
    return f'on {devices}; commit {commits}'


def read_diverged(folder: Path) -> dict[str, list[int]]:
    """Return the seeds of each row that ended with infinite numbers."""
    found: dict[str, list[int]] = {}
    for row, seed in sorted(name_of(path.parent) for path in folder.glob('*/diverged')):
        found.setdefault(row, []).append(seed)
    return found


def read_ensembles(path: Path) -> Iterator[tuple[tuple[int, ...], Missed]]:
    """Yield seeds and missed images of each archived ensemble; nothing if there is no file."""
    for own in read_lines(path):
        yield tuple(own['seeds']), unpacked(own)


# ----------------------------------------------------------------------------------------- command


def parser(name: str, results: Path) -> command.Parser:
    """Return the parser of a table's module in experiments/; `results` is its archive."""
    what = 'Archive finished runs, and rebuild the tables and figures from the archive.'
    found = command.Parser(prog=f'python -m experiments.{name}', description=what)
    what = 'workdirs of sweeps to archive first'
    found.add_argument('--runs', type=command.path, nargs='+', default=(), help=what)
    what = 'folder of the archive'
    found.add_argument('--results', type=command.path, default=results, help=what)
    return found


def main(
    name: str,
    results: Path,
    archive_sweep: Callable[[Path, Path], Path],
    build: Callable[[Path], str],
    argv: Sequence[str] | None = None,
) -> int:
    """Run the command of a table: archive the runs of sweeps, build the tables and print them.

    `archive_sweep` takes a sweep's folder and the archive, and returns the folder of the scale
    there; `build` writes the tables of such a folder, and returns the main one.
    """

    def act(args: argparse.Namespace) -> None:
        folders = sorted({archive_sweep(runs, args.results) for runs in args.runs})
        if not args.runs:
            folders = sorted(path for path in args.results.glob('*') if path.is_dir())
        if not folders:
            raise RunError(
                f'nothing is archived in {args.results}; give the workdirs of a sweep with --runs.'
            )
        for folder in folders:
            print(build(folder))
            log(f'in {folder}')

    return command.run(name, lambda: parser(name, results), act, argv)
