"""Test where a curve meets the target, which rate is chosen, and the text about both."""

import json
import math
import shutil

import jax
import numpy as np
import pytest

from alexnet_jax import config as configuration
from alexnet_jax.errors import RunError
from alexnet_jax.inference import evaluate
from alexnet_jax.model import alexnet
from experiments import figure1, figure1_net, output, sweep

SEEDS = 3


def curve(epochs_to_target: float, end: float = 2.0, every: float = 0.1) -> list[dict]:
    """Return window means of an error that falls linearly from 0.9 through 0.25."""
    ends = np.arange(1, round(end / every) + 1) * every
    errors = 0.9 - 0.65 * (ends - every / 2) / epochs_to_target
    return [
        {'kind': 'train', 'step': i, 'epoch': float(e), 'loss': 1.0, 'top1_error': max(0.01, error)}
        for i, (e, error) in enumerate(zip(ends, errors, strict=True), start=1)
    ]


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """Make a sweep's folder: ReLU is fastest at 0.016, tanh, three times slower, at 0.008."""
    folder = tmp_path_factory.mktemp('sweep')
    label = np.arange(4, dtype=np.int32)
    arrays = {'label': label, **{view: np.eye(4, dtype=np.float32) for view in evaluate.VIEWS}}
    scores = evaluate.summary(arrays, list('abcd'))
    for run in sweep.plan('figure1', folder, '', SEEDS, {}):
        function = 'relu' if 'relu' in run.row else 'tanh'
        rate = run.overrides['optimizer.weights.rate']
        best, least = (0.016, 0.25) if function == 'relu' else (0.008, 0.75)
        luck = 1 + 0.02 * run.seed * (1 if function == 'relu' else 1.1)
        takes = least * luck * (1 + abs(math.log2(rate / best)))
        config = sweep.resolve(run.config, run.overrides, run.row)
        run.workdir.mkdir(parents=True)
        (run.workdir / 'config.json').write_text(configuration.as_json(config))
        (run.workdir / 'environment.json').write_text('{}')
        records = [*curve(takes), {'kind': 'test', 'step': 20, **scores}]
        (run.workdir / 'metrics.jsonl').write_text(output.lines(records))
        np.savez(run.workdir / 'predictions_test.npz', **arrays)
    return folder / 'figure1-fashion_mnist'


@pytest.fixture
def runs(made, tmp_path):
    return shutil.copytree(made, tmp_path / made.name)


def test_where_a_curve_meets_the_target():
    assert figure1.epochs_to(curve(0.73), 0.25) == pytest.approx(0.73)
    assert figure1.epochs_to(curve(0.73), 0.5) == pytest.approx(0.73 * 0.4 / 0.65)
    assert figure1.epochs_to(curve(3.0), 0.25) == math.inf
    assert figure1.epochs_to(curve(0.73)[9:], 0.25) > 0  # there from its first record on
    assert figure1.epochs_to([], 0.25) == math.inf


def test_each_function_gets_its_own_rate(runs, tmp_path, capsys):
    results = tmp_path / 'results'
    assert figure1.main([f'--runs={runs}', f'--results={results}']) == 0
    out = capsys.readouterr().out
    assert 'tanh at 0.008 takes 3.0' in out
    assert (
        'times as many epochs as ReLU at 0.016 (3 seeds; brackets: 95 % interval over seeds).'
        in out
    )
    assert 'end of the grid' not in out
    by_rate = {line.split('|')[1].strip(): line for line in out.splitlines() if '| rate' in line}
    assert len(by_rate) == len(figure1.RATES)
    assert by_rate['rate 0.016'].split('|')[2].strip().startswith('**0.255')
    assert by_rate['rate 0.008'].split('|')[3].strip().startswith('**0.76')
    assert 'not reached by 3 of 3 seeds' in by_rate['rate 0.128']


def test_the_ratio_is_paired_by_seed(runs, tmp_path):
    folder = figure1.archive(runs, tmp_path / 'results')
    found = figure1.read(folder)
    relu, tanh = (figure1.chosen(found, function) for function in ('relu', 'tanh'))
    seeds, mean, low, high = figure1.ratio(tanh, relu)
    assert seeds == SEEDS
    each = [tanh.epochs()[seed] / relu.epochs()[seed] for seed in range(SEEDS)]
    assert mean == pytest.approx(np.exp(np.mean(np.log(each))))
    assert low < 3 < high
    one = figure1.Curves('relu', 0.016, {0: relu.seeds[0]})
    seeds, mean, low, _ = figure1.ratio(tanh, one)
    assert (seeds, mean) == (1, pytest.approx(each[0]))
    assert math.isnan(low)


def test_building_again_changes_nothing(runs, tmp_path):
    folder = figure1.archive(runs, tmp_path / 'results')
    figure1.build(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert before.keys() == {'table.md', 'figure1.svg'}
    for name in before:
        (folder / name).unlink()
    assert figure1.main([f'--results={tmp_path / "results"}']) == 0
    assert before == {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_committed_figures_are_those_of_the_committed_runs(tmp_path):
    """Check those that are committed."""
    for folder in sorted(figure1.RESULTS.glob('*/')):
        again = tmp_path / folder.name
        shutil.copytree(folder, again)
        figure1.build(again)
        for made in ('table.md', 'figure1.svg'):
            assert (again / made).read_bytes() == (folder / made).read_bytes(), folder / made


def test_a_rate_at_the_end_of_the_grid_is_reported(runs, tmp_path, capsys):
    for path in runs.glob('figure1_net_relu-*'):
        if path.name.split('-')[1] not in ('rate0.016', 'rate0.032'):
            shutil.rmtree(path)
    for path in runs.glob('figure1_net_tanh-rate0.0[01]*'):
        if path.name.split('-')[1] in ('rate0.001', 'rate0.002', 'rate0.004'):
            shutil.rmtree(path)
    assert figure1.main([f'--runs={runs}', f'--results={tmp_path / "results"}']) == 0
    out = capsys.readouterr().out
    assert 'tanh is fastest at the end of the grid' in out
    assert 'not run' in out


def test_nothing_is_archived_yet(tmp_path, capsys):
    assert figure1.main([f'--results={tmp_path / "results"}']) == 1
    assert 'give the workdirs of a sweep with --runs' in capsys.readouterr().err


def test_where_one_never_reaches_the_target_the_other_is_still_shown(runs, tmp_path):
    for path in runs.glob('figure1_net_tanh-*'):
        end = path.joinpath('metrics.jsonl').read_text().splitlines()[-1]
        (path / 'metrics.jsonl').write_text(output.lines(curve(9.0)) + end + '\n')
    folder = figure1.archive(runs, tmp_path / 'results')
    text = figure1.build(folder)
    assert 'One did not reach it with all seeds at any rate, so there is no ratio' in text
    assert '**0.255' in text
    assert (folder / 'figure1.svg').exists()
    assert figure1.main([f'--results={folder.parent}']) == 0


def test_seeds_that_only_one_has_are_not_compared(runs, tmp_path):
    for path in runs.glob('figure1_net_tanh-*-2'):
        shutil.rmtree(path)
    assert 'as ReLU at 0.016 (2 seeds' in figure1.build(figure1.archive(runs, tmp_path / 'results'))


def test_no_runs_and_damaged_ones(runs, tmp_path):
    with pytest.raises(RunError, match='no finished run'):
        figure1.archive(tmp_path / 'nowhere', tmp_path / 'results')
    folder = figure1.archive(runs, tmp_path / 'results')
    (folder / 'figure1_net_relu-rate0.016-1' / 'config.json').write_text('{')
    with pytest.raises(RunError, match=r'config.json cannot be read \(no JSON object'):
        figure1.read(folder)


@pytest.mark.parametrize('data', figure1_net.PIXELS)
def test_the_nets_differ_in_the_function_alone_and_regularise_nothing(data):
    both = [figure1_net.get_config(f'{data},{f}') for f in figure1_net.FUNCTIONS]
    relu, tanh = (json.loads(configuration.as_json(config)) for config in both)
    assert set(configuration.differences(relu, tanh)) == {
        'name', 'model.conv1.ops', 'model.conv2.ops', 'model.conv3.ops',
    }  # fmt: skip
    settings = configuration.unpack(both[0])
    assert len(settings.net.layers) == 4
    assert not any('dropout' in layer.ops for layer in settings.net.layers)
    assert settings.optimizer.weight_decay == 0
    assert (settings.preprocess.crop, settings.preprocess.mirror) == (False, False)
    assert settings.preprocess.colour_noise == 0
    params = jax.eval_shape(lambda: alexnet.init(jax.random.key(0), settings.net))
    channels = {'fashion_mnist': 1, 'cifar10': 3}[data]
    last = {'fashion_mnist': 2 * 2, 'cifar10': 3 * 3}[data]  # 28-13-6-2 and 32-15-7-3
    by_hand = 25 * (channels * 32 + 32 * 32 + 32 * 64) + 32 + 32 + 64 + (last * 64 + 1) * 10
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == by_hand
