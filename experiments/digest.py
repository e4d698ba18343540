"""What is kept of a run in the repository: small, and enough to compare it with others.

    <run>/config.json, environment.json, metrics.jsonl (a training record an epoch), wrong.json

Of a run whose numbers turned infinite there is no wrong.json, but an empty file `diverged`.
wrong.json is one JSON object: for one view and ten, which test images were missed in the first
place and among the first five, a bit an image (10,000 images are 1.7 kB of base64), and the labels'
sha256, so that only runs on the same images are compared. `ensembles.jsonl` beside the runs holds
the same of the ensembles of a row's seeds, which can only be made while the predictions are there.
"""

import base64
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alexnet_jax import config_file, files
from alexnet_jax.command import log
from alexnet_jax.errors import RunError
from alexnet_jax.inference import evaluate
from alexnet_jax.training import metrics

MEASURES = {'top1_error': 1, 'top5_error': 5}
ENSEMBLES = (2, 3, 5)  # sizes, beside that of all seeds
Wrong = dict[str, dict[str, np.ndarray]]  # view, measure -> bool [N]
RATHER = {'data.data_dir': 'data', 'loop.compilation_cache': 'beside'}  # no paths of this machine


@dataclasses.dataclass(frozen=True, eq=False)
class Kept:
    """A run as it is kept."""

    row: str
    seed: int
    config: dict[str, Any]
    environment: dict[str, Any]
    records: list[dict[str, Any]]
    wrong: Wrong
    labels: str  # their sha256

    def final(self) -> dict[str, Any]:
        """Its record of all test images."""
        return _last_test(self.records)


def _last_test(found: Sequence[Mapping[str, Any]]) -> Any:
    """Return the record of all test images, the last one of a run that was extended, or None."""
    return next((record for record in reversed(found) if record['kind'] == 'test'), None)


# ------------------------------------------------------------------------------------ to be written


def keep(workdir: Path, folder: Path) -> None:
    """Write what is kept of a finished run into `folder`.

    Raises:
        RunError: it is not finished, damaged, or its predictions are not those of its end.
    """
    found = metrics.read(workdir)
    final = _last_test(found)
    if final is None:
        raise RunError(f'{workdir} is not finished; the same sweep goes on.')
    arrays = evaluate.load_predictions(workdir)
    missed = wrong(arrays)
    for view, measure in itertools.product(evaluate.VIEWS, MEASURES):
        if float(np.mean(missed[view][measure])) != final[view][measure]:
            raise RunError(
                f'{workdir}/predictions_test.npz is not of the end of the run (its {measure} '
                f'differs from metrics.jsonl); make it with --mode=evaluate --step=latest.'
            )
    _keep_records(workdir, found, folder)
    write_text(folder / 'wrong.json', lines([packed(missed, arrays['label'])]))
    (folder / 'diverged').unlink(missing_ok=True)  # code has changed since


def _keep_records(workdir: Path, found: Sequence[Mapping[str, Any]], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_text(
        folder / 'config.json', json.dumps(portable(workdir), indent=2, sort_keys=True) + '\n'
    )
    write_text(folder / 'environment.json', (workdir / 'environment.json').read_text())
    write_text(folder / 'metrics.jsonl', lines(thinned(found)))


def keep_all(
    folder: Path, results: Path, rows: Sequence[str]
) -> tuple[Path, dict[tuple[str, int], Path]]:
    """Keep every finished run of a sweep's folder that is of one of `rows`.

    Returns:
        Where they are kept, results/<scale>, and the workdirs by row and seed.

    Raises:
        RunError: there is none, one is damaged, or they are of several scales.
    """
    found, lost = {}, {}
    for path in sorted(folder.glob('*/metrics.jsonl')):
        row, _, seed = path.parent.name.rpartition('-')
        if row not in rows or not seed.isdigit():
            log(f'{path.parent} is no run of the table, and is left out.')
        elif (path.parent / 'predictions_test.npz').exists():
            found[row, int(seed)] = path.parent
        elif diverged(path.parent):
            lost[row, int(seed)] = path.parent
        else:
            log(f'{path.parent} is not finished, and is left out.')
    scales = {portable(workdir)['scale'] for workdir in (found | lost).values()}
    if len(scales) != 1:
        what = f'runs of {len(scales)} scales' if scales else 'no finished run'
        raise RunError(f'{folder} holds {what}; a table is made of one sweep at one scale.')
    target = results / scales.pop()
    for (row, seed), workdir in found.items():
        keep(workdir, target / f'{row}-{seed}')
    for (row, seed), workdir in lost.items():
        kept = target / f'{row}-{seed}'
        _keep_records(workdir, metrics.read(workdir), kept)
        write_text(kept / 'diverged', '')
        (kept / 'wrong.json').unlink(missing_ok=True)
    return target, found


def diverged(workdir: Path) -> bool:
    """Whether a run of a sweep ended with infinite numbers."""
    log = workdir / 'log.txt'
    return log.exists() and 'is not finite' in log.read_text(errors='replace')


def wrong(arrays: Mapping[str, np.ndarray]) -> Wrong:
    """Which images were missed; ranked as evaluate.scores ranks them."""
    label, result = arrays['label'], {}
    for view in evaluate.VIEWS:
        rank = evaluate.ranks(arrays[view], label)
        result[view] = {measure: rank >= k for measure, k in MEASURES.items()}
    return result


def thinned(found: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Validation and test records, and of training the one before each validation."""
    result: list[Mapping[str, Any]] = []
    last: Mapping[str, Any] | None = None
    for record in found:
        if record['kind'] == 'train':
            last = record
            continue
        if record['kind'] == 'validation' and last is not None:
            result.append(last)
        result.append(record)
    return result


def portable(workdir: Path) -> dict[str, Any]:
    """A run's config, without the folders of the machine it ran on."""
    config = config_file.read_json(workdir / 'config.json')
    for key, value in RATHER.items():
        group, _, name = key.partition('.')
        config[group][name] = value
    return config


def packed(missed: Wrong, label: np.ndarray) -> dict[str, Any]:
    """As JSON can hold it."""
    bits = {
        view: {m: base64.b64encode(np.packbits(own[m]).tobytes()).decode() for m in MEASURES}
        for view, own in missed.items()
    }
    sha256 = hashlib.sha256(label.astype('<i4').tobytes()).hexdigest()
    return {'images': len(label), 'labels_sha256': sha256, 'wrong': bits}


def ensembles(workdirs: Mapping[int, Path], path: Path) -> None:
    """Write which images ensembles of seeds miss, their probabilities averaged.

    For each size of ENSEMBLES there are as many ensembles as seeds, of seeds that follow each other
    in a circle, so that every seed counts as often. Ensembles of other seeds in the file stay.

    Args:
        workdirs: of one row's runs, by seed.
        path: a .jsonl file, one ensemble a line.
    """
    arrays = {
        seed: evaluate.load_predictions(workdir) for seed, workdir in sorted(workdirs.items())
    }
    found = [own for own in _objects(path) if not {*own['seeds']} & {*workdirs}]
    order = list(arrays)
    for count in sorted({*ENSEMBLES, len(order)} & {*range(2, len(order) + 1)}):
        chosen = {tuple(sorted((order[i:] + order[:i])[:count])): None for i in range(len(order))}
        for seeds in chosen:
            members = [arrays[seed] for seed in seeds]
            mean = {view: np.mean([m[view] for m in members], axis=0) for view in evaluate.VIEWS}
            label = members[0]['label']
            found.append({'seeds': seeds, **packed(wrong({'label': label, **mean}), label)})
    write_text(path, lines(found))


def lines(found: Sequence[Mapping[str, Any]]) -> str:
    """JSON, an object a line."""
    return ''.join(json.dumps(record) + '\n' for record in found)


def write_text(path: Path, text: str) -> None:
    """Write a file that is whole or not there."""
    with files.atomic_write(path) as scratch:
        scratch.write_text(text)


# --------------------------------------------------------------------------------------- to be read


def read(folder: Path) -> list[Kept]:
    """All kept runs of a folder, by row and seed.

    Raises:
        RunError: there is none, one is damaged, or they are of several scales or test sets.
    """
    runs = sorted(_read(path.parent) for path in folder.glob('*/wrong.json'))
    kept = [run for _, run in runs]
    if not kept:
        raise RunError(f'no run is kept in {folder}; name the --runs of a sweep.')
    for what, values in (
        ('scales', {run.config['scale'] for run in kept}),
        ('test images', {run.labels for run in kept}),
    ):
        if len(values) > 1:
            raise RunError(f'the runs in {folder} are of {len(values)} {what}; part them.')
    return kept


def _read(folder: Path) -> tuple[tuple[str, int], Kept]:
    row, _, seed = folder.name.rpartition('-')
    try:
        own = json.loads((folder / 'wrong.json').read_text())
        run = Kept(
            row=row,
            seed=int(seed),
            config=config_file.read_json(folder / 'config.json'),
            environment=json.loads((folder / 'environment.json').read_text()),
            records=metrics.read(folder),
            wrong=unpacked(own),
            labels=own['labels_sha256'],
        )
        if run.final() is None:
            raise ValueError('metrics.jsonl has no test record')
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f'{folder} is damaged ({error!r}); keep the run again.') from error
    return (run.row, run.seed), run


def unpacked(own: Mapping[str, Any]) -> Wrong:
    """What `packed` made."""

    def bits(text: str) -> np.ndarray:
        raw = np.frombuffer(base64.b64decode(text, validate=True), np.uint8)
        return np.unpackbits(raw)[: own['images']].astype(bool)

    return {v: {m: bits(own['wrong'][v][m]) for m in MEASURES} for v in evaluate.VIEWS}


def read_diverged(folder: Path) -> dict[str, list[int]]:
    """The seeds of each row that ended with infinite numbers."""
    found: dict[str, list[int]] = {}
    for path in sorted(folder.glob('*/diverged')):
        row, _, seed = path.parent.name.rpartition('-')
        found.setdefault(row, []).append(int(seed))
    return found


def read_ensembles(path: Path) -> Iterator[tuple[tuple[int, ...], Wrong]]:
    """Seeds of each kept ensemble, and what it misses; none if there is no file."""
    for own in _objects(path):
        yield tuple(own['seeds']), unpacked(own)


def _objects(path: Path) -> list[dict[str, Any]]:
    text = path.read_text() if path.exists() else ''
    return [json.loads(line) for line in text.splitlines()]
