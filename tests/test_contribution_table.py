"""Test the findings on known differences, from run directories alone, and that builds repeat."""

import csv
import importlib
import json
import math
import shutil
import types
from pathlib import Path

import numpy as np
import pytest

from alexnet_jax import config as configuration
from alexnet_jax.analysis import drawing
from alexnet_jax.errors import RunError
from alexnet_jax.inference import evaluate
from alexnet_jax.training import metrics
from configs import ABLATIONS, Claim
from experiments import contribution_table, intervals, output, run_archive, variants

IMAGES, CLASSES, SEEDS = 2000, 10, 3
# The true change of the top-1 error.
KNOWN = {
    'alexnet': 0.0,
    'ablation_lrn': 0.08,
    'ablation_tanh': -0.06,
    'ablation_overlap': 0.0,
    'ablation_sigmoid': 0.8,
    'ablation_dropout': 0.05,  # and its seed 1 does not train
    'ablation_init': 0.0,  # and its seed 2 ends in infinite numbers
}


def fake_run(folder: Path, row: str, seed: int, change: float, scale: str = 'quickstart') -> Path:
    """Make a finished workdir whose net misses a tenth of the images and `change` more."""
    workdir = folder / f'{row}-{seed}'
    workdir.mkdir(parents=True)
    config = importlib.import_module(f'configs.{row}').get_config(scale)
    config.seed, config.data.data_dir = seed, '/somewhere/on/this/machine'
    (workdir / 'config.json').write_text(configuration.as_json(config))
    environment = {'device': 'a processor', 'commit': 'c' * 40, 'cpus': 2}
    (workdir / 'environment.json').write_text(json.dumps(environment))
    arrays = predictions(row, seed, 0.1 + change)
    scores = evaluate.summary(arrays, [str(i) for i in range(CLASSES)])
    np.savez(workdir / 'predictions_test.npz', **arrays)
    lines = []
    for step in range(1, 9):
        lines.append(
            {'kind': 'train', 'step': step, 'epoch': step / 2, 'top1_error': 1 / step, 'loss': 1.0}
        )
        if step % 4 == 0:
            values = {'epoch': step / 2, 'top1_error': 0.9 / step, 'top5_error': 0.0, 'nll': 1.0}
            lines.append({'kind': 'validation', 'step': step, **values})
    lines.append({'kind': 'test', 'step': 8, 'secs': 3600.0, **scores})
    (workdir / 'metrics.jsonl').write_text(output.lines(lines))
    return workdir


def predictions(row: str, seed: int, error: float) -> dict[str, np.ndarray]:
    """Make predictions; each image has its difficulty, and one view misses a little more."""
    label = np.random.default_rng(0).integers(CLASSES, size=IMAGES).astype(np.int32)
    difficulty = np.random.default_rng(1).random(IMAGES)
    own = np.random.default_rng([seed, *row.encode()])
    arrays: dict[str, np.ndarray] = {'label': label}
    for view, more in (('ten_views', 0.0), ('centre', 0.04)):
        wrong = difficulty + own.uniform(-0.05, 0.05, IMAGES) < error + more
        first = np.where(wrong, (label + 1) % CLASSES, label)
        arrays[view] = np.full((IMAGES, CLASSES), 0.05, np.float32)
        arrays[view][np.arange(IMAGES), first] = 0.55
        arrays[view][np.arange(IMAGES), label] += own.uniform(0, 0.45, IMAGES) * wrong
    return arrays


@pytest.fixture(scope='module')
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('sweep') / 'contribution_table-quickstart'
    for row, change in KNOWN.items():
        for seed in range(SEEDS):
            stuck = (row, seed) == ('ablation_dropout', 1)
            fake_run(folder, row, seed, 0.8 if stuck else change)
    lost = folder / 'ablation_init-2'
    (lost / 'predictions_test.npz').unlink()
    (lost / 'log.txt').write_text('main.py: step 9: the loss or a gradient is not finite, first\n')
    return folder


@pytest.fixture(scope='module')
def built(runs, tmp_path_factory) -> Path:
    results = tmp_path_factory.mktemp('results')
    argv = [f'--runs={runs}', f'--results={results}']
    assert contribution_table.main(argv) == 0
    return results / 'quickstart'


@pytest.fixture(scope='module')
def lines(built) -> dict[tuple[str, str, str], dict[str, str]]:
    """Return the lines of table.csv, by change, view and measure."""
    with (built / 'table.csv').open() as file:
        return {(r['change'], r['view'], r['measure']): r for r in csv.DictReader(file)}


@pytest.fixture
def no_figures(monkeypatch) -> None:
    """Leave out the figures, which take a second."""
    monkeypatch.setattr(drawing, 'render', lambda *_: b'')


def test_findings_match_the_known_changes(lines):
    for change, true, finding in (
        ('no normalisation', 0.08, 'worse'),
        ('tanh instead of ReLU', -0.06, 'better'),
        ('pooling windows do not overlap', 0.0, 'inconclusive'),
        ('sigmoid instead of ReLU', 0.8, 'did not train'),
    ):
        row = lines[change, 'centre', 'top1_error']
        assert row['finding'] == finding, row
        assert float(row['low']) <= true + 0.01
        assert float(row['high']) >= true - 0.01
        assert (row['seeds'], row['images']) == ('3', str(IMAGES))
        assert finding == 'did not train' or float(row['p']) <= float(row['p_holm'])


def test_numbers_are_those_of_the_predictions(runs, lines):
    def errors(row: str) -> list[float]:
        files = [np.load(runs / f'{row}-{seed}/predictions_test.npz') for seed in range(SEEDS)]
        return [1 - np.mean(f['ten_views'].argmax(axis=1) == f['label']) for f in files]

    row = lines['no normalisation', 'ten_views', 'top1_error']
    each = np.subtract(errors('ablation_lrn'), errors('alexnet'))
    assert float(row['error']) == pytest.approx(np.mean(errors('ablation_lrn')), abs=1e-6)
    assert float(row['difference']) == pytest.approx(each.mean(), abs=1e-6)
    assert float(row['std_of_seeds']) == pytest.approx(each.std(ddof=1), abs=1e-6)


def test_a_row_not_run_is_marked(built, lines):
    table = (built / 'table.md').read_text()
    missing = [stem for stem in ABLATIONS if stem not in KNOWN]
    assert table.count('| not run | not run |') >= len(missing)
    assert lines['no colour noise', 'ten_views', 'top1_error']['finding'] == 'not run'
    assert lines['no colour noise', 'ten_views', 'top1_error']['difference'] == ''


def test_seeds_that_did_not_train_are_counted_and_not_averaged(lines):
    row = lines['no dropout', 'ten_views', 'top1_error']
    assert row['finding'] == '1 of 3 seeds did not train'
    assert (row['seeds'], row['p_holm']) == ('2', '')
    assert float(row['difference']) == pytest.approx(0.05, abs=0.02)
    row = lines['init 0.01 in every layer', 'ten_views', 'top1_error']
    assert row['finding'] == '1 of 3 seeds did not train'
    assert (row['seeds'], row['p_holm']) == ('2', '')


def test_a_row_that_does_not_train_gets_a_rate_chosen_on_validation(runs, tmp_path, no_figures):
    """Choose by the validation error of seeds 0 to 2, whatever the test errors are."""
    folder = tmp_path / 'rates'
    for rate, validation, change in ((0.01, 0.2, 0.05), (0.005, 0.3, 0.0)):
        for seed in range(SEEDS):
            workdir = fake_run(folder, 'ablation_dropout', seed, change)
            config = json.loads((workdir / 'config.json').read_text())
            config['optimizer']['weights']['rate'] = rate
            (workdir / 'config.json').write_text(json.dumps(config))
            records_ = (workdir / 'metrics.jsonl').read_text().splitlines()
            lines_ = [json.loads(line) for line in records_]
            for line in lines_:
                if line['kind'] == 'validation':
                    line['top1_error'] = validation
            (workdir / 'metrics.jsonl').write_text(output.lines(lines_))
            workdir.rename(folder / f'ablation_dropout-rate{rate}-{seed}')
    base = tmp_path / 'base'
    shutil.copytree(runs, base)
    for seed in range(SEEDS):  # at the base's rate: worse on validation
        path = base / f'ablation_dropout-{seed}/metrics.jsonl'
        path.write_text(path.read_text().replace('"top1_error": 0.1125', '"top1_error": 0.9'))
    argv = ['--runs', str(base), str(folder), f'--results={tmp_path / "results"}']
    assert contribution_table.main(argv) == 0
    table = (tmp_path / 'results/quickstart/table.md').read_text()
    assert '| no dropout, weight rate 0.01 (chosen on validation) |' in table
    assert 'weight rate 0.005' not in table
    assert '| no dropout | ' in table


def test_an_interval_inside_the_margin_is_a_finding():
    def row(low: float, high: float, p: float) -> str:
        found = intervals.Difference((low + high) / 2, 5, 100, low, high, p, p_holm=p)
        claim = Claim('', '', '', None, None, '')
        row = contribution_table.Row(claim, {'top1_error': found})
        return row.finding('top1_error')

    assert row(-0.002, 0.001, 0.4) == 'equivalent'
    assert row(-0.004, 0.001, 0.4) == 'inconclusive'
    assert row(0.001, 0.009, 0.2) == 'inconclusive, n.s. after Holm'
    assert row(0.001, 0.009, 0.01) == 'worse'
    assert row(-0.0025, -0.001, 0.01) == 'better'


def test_all_seeds_lost(runs, tmp_path, no_figures):
    folder = tmp_path / 'sweep'
    shutil.copytree(runs, folder)
    for seed in range(SEEDS):
        (folder / f'ablation_init-{seed}/predictions_test.npz').unlink(missing_ok=True)
        (folder / f'ablation_init-{seed}/log.txt').write_text('the loss is not finite')
    assert contribution_table.main([f'--runs={folder}', f'--results={tmp_path}']) == 0
    table = (tmp_path / 'quickstart/table.md').read_text()
    assert '| init 0.01 in every layer | did not train |' in table


def test_one_view_and_ensembles_come_without_training(runs, lines):
    one = lines['one view instead of ten', 'ten_views', 'top1_error']
    assert one['finding'] == 'worse'
    assert float(one['difference']) == pytest.approx(0.04, abs=0.01)
    members = [dict(np.load(runs / f'alexnet-{seed}/predictions_test.npz')) for seed in range(3)]
    mean = np.mean([m['ten_views'] for m in members], axis=0)
    expected = evaluate.scores(mean, members[0]['label'])
    for measure, value in expected.items():
        if measure != 'nll':
            row = lines['3 nets averaged, of 3 seeds', 'ten_views', measure]
            assert float(row['error']) == pytest.approx(value, abs=1e-6)
            assert row['interval_over'] == 'images'
    assert ('2 nets averaged, of 3 seeds', 'ten_views', 'top1_error') in lines


def test_the_claims_name_their_data(built):
    table = (built / 'table.md').read_text()
    assert '+1.4 / +1.2 on ILSVRC-2012 val' in table
    assert '+1.7 / +1.2 on ILSVRC-2010 test' in table
    assert 'fashion_mnist, all 2000 images' in table


def test_building_again_from_the_archive_changes_nothing(built, tmp_path):
    again = tmp_path / 'quickstart'
    shutil.copytree(built, again)
    for made in ('table.md', 'short.md', 'table.csv', 'differences.svg', 'curves.svg'):
        (again / made).unlink()
    assert contribution_table.main([f'--results={tmp_path}']) == 0
    assert {p.name: p.read_bytes() for p in again.iterdir() if p.is_file()} == {
        p.name: p.read_bytes() for p in built.iterdir() if p.is_file()
    }


def test_the_archive_is_small_and_portable(built):
    folder = built / 'alexnet-0'
    files = {path.name: path.read_text() for path in folder.iterdir()}
    assert files.keys() == {'config.json', 'environment.json', 'metrics.jsonl', 'wrong.json'}
    assert len(files['wrong.json']) < 4 * IMAGES / 8 * 4 / 3 + 300
    assert '/somewhere' not in ''.join(files.values())
    kinds = [record['kind'] for record in metrics.read(folder)]
    assert kinds == ['train', 'validation', 'train', 'validation', 'test']


def test_committed_tables_are_those_of_the_committed_runs(tmp_path):
    """Check those that are committed."""
    for folder in sorted(contribution_table.RESULTS.glob('*/')):
        again = tmp_path / folder.name
        shutil.copytree(folder, again)
        contribution_table.build(again)
        for made in ('table.md', 'short.md', 'table.csv', 'differences.svg', 'curves.svg'):
            assert (again / made).read_bytes() == (folder / made).read_bytes(), folder / made


def test_a_real_run_is_archived_unchanged(smoke_run, tmp_path):
    run_archive.archive(smoke_run, tmp_path / 'smoke-0')
    (kept,) = run_archive.read(tmp_path)
    assert (kept.row, kept.seed) == ('smoke', 0)
    for view in evaluate.VIEWS:
        for measure in run_archive.MEASURES:
            assert kept.wrong[view][measure].mean() == kept.final()[view][measure]
    with np.load(smoke_run / 'predictions_test.npz') as file:
        missed = file['centre'].argmax(axis=1) != file['label']
    assert kept.wrong['centre']['top1_error'].tolist() == missed.tolist()


def test_predictions_of_another_step_are_refused(smoke_run, tmp_path):
    """Refuse predictions that --mode=evaluate --step=best has written."""
    copy = tmp_path / 'run'
    shutil.copytree(smoke_run, copy)
    with np.load(copy / 'predictions_test.npz') as file:
        arrays = dict(file)
    arrays['centre'] = np.roll(arrays['centre'], 1, axis=1)
    np.savez(copy / 'predictions_test.npz', **arrays)
    with pytest.raises(RunError, match='not from the end of the run'):
        run_archive.archive(copy, tmp_path / 'kept')
    assert not (tmp_path / 'kept').exists()


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (lambda run: (run / 'wrong.json').write_text('{'), 'is damaged'),
        (lambda run: (run / 'config.json').unlink(), 'config.json cannot be read (No such file'),
        (lambda run: (run / 'metrics.jsonl').write_text(''), 'is damaged'),
        (lambda run: shutil.rmtree(run.parent / 'alexnet-1'), None),
        (lambda run: [shutil.rmtree(p) for p in run.parent.glob('alexnet-*')], 'no finished run'),
    ],
)
def test_damage_is_reported(built, tmp_path, capsys, no_figures, damage, message):
    folder = tmp_path / 'quickstart'
    shutil.copytree(built, folder)
    damage(folder / 'ablation_lrn-0')
    assert contribution_table.main([f'--results={tmp_path}']) == (1 if message else 0)
    assert (message or '') in capsys.readouterr().err
    if message is None:  # the seeds in both rows are compared
        assert '| 2 |' in (folder / 'table.md').read_text()


def test_other_images_are_not_compared(built, tmp_path):
    shutil.copytree(built, tmp_path / 'quickstart')
    path = tmp_path / 'quickstart' / 'ablation_lrn-0' / 'wrong.json'
    own = json.loads(path.read_text())
    path.write_text(json.dumps(own | {'labels_sha256': '0' * 64}))
    with pytest.raises(RunError, match='2 test images'):
        run_archive.read(tmp_path / 'quickstart')


def test_recipes_do_not_share_a_table(built, tmp_path, capsys, no_figures):
    shutil.copytree(built, tmp_path / 'quickstart')
    path = tmp_path / 'quickstart' / 'ablation_lrn-0' / 'config.json'
    config = json.loads(path.read_text())
    config['data']['workers'] = 7  # no matter
    path.write_text(json.dumps(config))
    assert contribution_table.main([f'--results={tmp_path}']) == 0
    config['optimizer']['weights']['rate'] = 0.5
    path.write_text(json.dumps(config))
    assert contribution_table.main([f'--results={tmp_path}']) == 1
    error = capsys.readouterr().err
    assert 'ablation_lrn-0 has another recipe than alexnet-0: see optimizer.weights.rate' in error


def test_scales_do_not_share_a_table(runs, tmp_path, capsys):
    mixed = tmp_path / 'mixed'
    shutil.copytree(runs, mixed)
    fake_run(mixed, 'ablation_depth', 0, 0.0, scale='fashion_mnist')
    argv = [f'--runs={mixed}', f'--results={tmp_path / "results"}']
    assert contribution_table.main(argv) == 1
    assert 'runs of 2 scales' in capsys.readouterr().err
    assert not (tmp_path / 'results').exists()


def test_one_seed_has_no_interval(runs, tmp_path, no_figures):
    few = tmp_path / 'few'
    for row in KNOWN:
        shutil.copytree(runs / f'{row}-0', few / f'{row}-0')
    results = tmp_path / 'results'
    assert contribution_table.main([f'--runs={few}', f'--results={results}']) == 0
    table = (results / 'quickstart' / 'table.md').read_text()
    assert 'too few seeds' in table
    assert 'worse' not in table.partition('\n\n')[0]


def test_nothing_archived_yet(tmp_path, capsys):
    assert contribution_table.main([f'--results={tmp_path}']) == 1
    assert 'give the workdirs of a sweep with --runs' in capsys.readouterr().err


def test_the_variants_are_beside_the_reported_figures(tmp_path, capsys):
    """Check that reported figures are at full size only."""
    for scale, reported in (('quickstart', '-'), ('fashion_mnist', '0.885')):
        folder = tmp_path / f'variants-{scale}'
        for seed in range(2):
            fake_run(folder, 'variant_d2l', seed, 0.0, scale)
        argv = [f'--runs={folder}', f'--results={tmp_path / "results"}']
        assert variants.main(argv) == 0
        rows = {line.split(' | ')[0]: line for line in capsys.readouterr().out.splitlines()}
        assert rows['| variant_d2l'].endswith(f'| {reported} |')
        assert '| not run | not run |' in rows['| variant_lenet']
        by_epoch = [rows[row] for row in rows if 'variant_d2l, seed 0' in row]
        assert len(by_epoch) == (reported != '-')
        if by_epoch:
            assert by_epoch[0].endswith('test accuracy after epoch | 2 | 4 |')
            assert '| 0.775 | 0.887 |' in rows['| here, a processor, 60.0 min']
        right = [1 - np.mean(_missed(folder / f'variant_d2l-{seed}')) for seed in range(2)]
        spread = np.std(right, ddof=1)
        assert f'| 2 | {np.mean(right):.4f} ± {spread:.4f} |' in rows['| variant_d2l']


def test_epochs_of_60000_images_match_the_reported_ones():
    """Check that an epoch of 468.75 steps, which ends at 5.0005 epochs, counts as the fifth."""
    run = types.SimpleNamespace(
        row='variant_gluon',
        seed=0,
        environment={'device': 'a processor'},
        final=lambda: {'secs': 36},
    )
    steps = [math.ceil(468.75 * epoch) for epoch in range(1, 11)]
    run.records = [
        {'kind': 'train', 'epoch': 0.5, 'loss': 1.5},
        {'kind': 'train', 'epoch': 1.0, 'loss': 2.5},
        *({'kind': 'validation', 'epoch': step / 468.75, 'top1_error': 0.2} for step in steps),
    ]
    head, _, _, reported, training = variants.by_epoch([run])[0].splitlines()
    assert head.endswith('after epoch | 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 | 9 | 10 |')
    assert reported.startswith('| reported | 0.756 | 0.804 | 0.835 | 0.854 | 0.866 | - |')
    assert training.startswith('| training loss, here | 2.000 | - |')


def _missed(workdir: Path) -> np.ndarray:
    with np.load(workdir / 'predictions_test.npz') as file:
        return file['centre'].argmax(axis=1) != file['label']
