"""Test that the comparison is fair, the roofline is arithmetic, and the tables show the rows."""

import argparse
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from alexnet_jax.data import datasets
from alexnet_jax.errors import RunError
from alexnet_jax.model.alexnet import geometry
from alexnet_jax.training import metrics
from configs import alexnet, smoke, variant_torchvision
from examples import alexnet_plain
from experiments import scaling
from experiments.output import lines, slug
from experiments.throughput import __main__ as throughput
from experiments.throughput import (
    baselines,
    input_pipeline,
    layers,
    results,
    roofline,
    steps,
    tables,
    timing,
)
from experiments.throughput.roofline import Rates, Work
from experiments.throughput.timing import Benchmark

RATES = Rates(flops=1e9, bytes=1e8)
NETS = {'2012': alexnet, 'torchvision': variant_torchvision}


def small(net: str, dropout: bool = True, batch_size: int = 4) -> baselines.Case:
    """Return a net of the table at an eighth of its widths, 112 px."""
    config = NETS[net].get_config('quickstart')
    config.scale = 'imagenet2012'  # so that naive Flax is measured
    config.model.channels = 3
    alexnet.narrow(config.model, 2)
    if not dropout:
        for name in config.model.layers:
            ops = config.model[name].ops
            config.model[name].ops = tuple(op for op in ops if op != 'dropout')
    return baselines.case_of(config, batch_size)


def forms(case: baselines.Case, what: str) -> dict[str, Benchmark]:
    """Make every form, but not PyTorch's compiled ones, which take minutes."""
    return {
        name: make()
        for name, make in baselines.benchmarks(case, what)
        if 'compiled' not in name and 'CUDA' not in name
    }


# --------------------------------------------------------------------------------- the same net


@pytest.fixture
def narrow_example(monkeypatch) -> None:
    """Divide the widths of examples/alexnet_plain.py by eight too."""
    conv, dense = alexnet_plain.conv, alexnet_plain.dense

    def narrow_dense(name, features, *, bias):
        return dense(name, features if name == 'fc8' else features // 8, bias=bias)

    monkeypatch.setattr(
        alexnet_plain, 'conv', lambda name, n, *args, **more: conv(name, n // 8, *args, **more)
    )
    monkeypatch.setattr(alexnet_plain, 'dense', narrow_dense)


@pytest.mark.parametrize(('net', 'count'), [('2012', 2), ('torchvision', 1)])
def test_every_form_gives_the_same_logits(net, count, narrow_example):
    case = small(net)
    logits = {name: form.value(form.run(1)) for name, form in forms(case, 'forward').items()}
    assert len(logits) == count + (2 if baselines.torch_is_here() else 0)
    for name, found in logits.items():
        error = np.linalg.norm(found - logits['ours']) / np.linalg.norm(logits['ours'])
        assert error < 1e-5, name  # float32 summed in other orders; found: 1e-6 at most


def test_every_form_trains_alike(monkeypatch, narrow_example):
    """Compare losses of steps 1 and 4, without dropout, whose masks each draws in its own way."""
    monkeypatch.setattr(alexnet_plain.AlexNet, 'dropout', lambda self, x, train: x)
    found = forms(small('2012', dropout=False), 'train')
    assert 'naive' in found
    first = {name: float(form.value(form.run(1))) for name, form in found.items()}
    fourth = {name: float(form.value(form.run(3))) for name, form in found.items()}
    assert abs(first['ours'] - fourth['ours']) > 1e-3, 'nothing was learnt'
    for name in found:
        assert first[name] == pytest.approx(first['ours'], rel=1e-5), name
        assert fourth[name] == pytest.approx(fourth['ours'], rel=1e-4), name  # rounding has grown


def test_a_form_that_computes_something_else_is_found_out():
    case = small('2012')
    row = {'net': '2012', 'pass': 'forward', 'forms': {'ours': {}, 'other': {}}}
    values = {'ours': np.ones((4, 10)), 'other': np.ones((4, 10)) * 1.01}
    with pytest.raises(RunError, match='the logits of other are not those of ours'):
        steps._check(row, values, case)
    row['pass'] = 'train'
    with pytest.raises(RunError, match='is not finite'):
        steps._check(row, {'ours': np.float32('nan')}, case)


# ------------------------------------------------------------------------------------- the clock


class Clock:
    """Clock that advances only when a benchmark runs."""

    def __init__(self, monkeypatch):
        self.now, self.order = 0.0, []
        monkeypatch.setattr(timing.time, 'perf_counter', lambda: self.now)
        monkeypatch.setattr(timing.time, 'process_time', lambda: 2 * self.now)

    def benchmark(self, name: str, *secs: float):
        """Return a maker of a benchmark whose steps take these times, the last one repeatedly."""
        left = list(secs)

        def run(steps):
            for _ in range(steps):
                self.now += left.pop(0) if len(left) > 1 else left[0]
                self.order.append(name)
            return np.zeros(())

        return lambda: Benchmark(run)


def test_benchmarks_take_turns(monkeypatch):
    clock = Clock(monkeypatch)
    makers = {'a': clock.benchmark('a', 9.0, 1.0), 'b': clock.benchmark('b', 9.0, 0.5)}
    rows, _ = timing.alternate(makers, rounds=3, sample_secs=1.0)
    assert ''.join(clock.order) == 'aabb' + 'abb' * 3  # the first call compiles, the second counts
    assert rows['a']['secs'] == [1.0] * 3
    assert rows['b'] == {'first_secs': 9.0, 'steps': 2, 'secs': [0.5] * 3, 'cpu_secs': [1.0] * 3}
    assert timing.ratio(rows['a'], rows['b']) == 2.0


def test_broken_forms_of_pytorch_are_reported(monkeypatch):
    clock = Clock(monkeypatch)

    def broken():
        raise ValueError('no compiler')

    makers = {
        'ours': clock.benchmark('o', 8.0),
        'torch, eager': clock.benchmark('e', 1.4),
        'torch, fast': clock.benchmark('f', 1.0),
        'torch, broken': broken,
    }
    rows, _ = timing.alternate(makers, rounds=3, sample_secs=0.1)
    assert {name: len(row.get('secs', ())) for name, row in rows.items()} == {
        'ours': 3, 'torch, eager': 3, 'torch, fast': 3, 'torch, broken': 0,
    }  # fmt: skip
    assert rows['torch, broken'] == {'failed': 'ValueError: no compiler'}
    assert timing.best_torch(rows) == 'torch, fast'
    with pytest.raises(ValueError, match='no compiler'):
        timing.alternate({'ours': broken}, rounds=1, sample_secs=1.0)


# ------------------------------------------------------------------------------------- the limit


def test_operations_of_a_step_are_those_counted_elsewhere():
    settings = scaling.settings_of('2012', 'data', 1)
    found = roofline.step_flops(settings.net, settings.batch_size, 'train')
    first, *rest = [stage.multiply_adds for stage in geometry(settings.net)]
    assert found == 2 * settings.batch_size * (2 * first + 3 * sum(rest))
    assert roofline.step_flops(settings.net, 1, 'forward') == 2 * 724_406_816


def test_bytes_of_a_layer_by_hand():
    net = scaling.settings_of('2012', 'data', 1).net
    conv1, conv2, *_ = geometry(net)
    image, maps = 4 * 224 * 224 * 3, 4 * 27 * 27 * 96
    assert roofline.layer(conv1, net, 10, 'forward').bytes == 10 * (image + maps) + 4 * 34_944
    # No gradient of the image: read image and gradient, write 34,944 gradients of parameters.
    assert roofline.layer(conv1, net, 10, 'backward').bytes == 10 * (image + maps) + 4 * 34_944
    result, parameters = 4 * 13 * 13 * 256, 4 * conv2.parameters
    assert (
        roofline.layer(conv2, net, 10, 'backward').bytes
        == 10 * (maps + result + maps) + 2 * parameters
    )
    assert roofline.update(net).bytes == 5 * 4 * 60_965_224


def test_the_roofline_is_the_slower_of_the_two():
    work = Work(flops=10**9, bytes=10**7)
    assert work.secs(RATES) == 1.0
    assert work.bound(RATES) == 'FLOPs'
    assert Work(flops=10**6, bytes=10**8).secs(RATES) == 1.0
    assert Work(bytes=10**8).bound(RATES) == 'bytes'


def test_pieces_are_the_complete_step():
    """Check every op of every layer in both directions; their products are the step's."""
    case = small('2012')
    found = list(layers.pieces(case))
    names = {(piece.layer, piece.op, piece.direction) for piece in found}
    assert len(names) == len(found)
    for layer in case.net.layers:
        for op in ('linear', *layer.ops):
            assert {(layer.name, op, 'forward'), (layer.name, op, 'backward')} <= names
    total = sum(piece.work.flops for piece in found)
    assert total == roofline.step_flops(case.net, case.settings.batch_size, 'train')


class ShortNet:
    """The smoke config with a layer of each kind."""

    @staticmethod
    def get_config(scale):
        config = smoke.get_config(scale)
        config.model.layers = ('conv1', 'fc8')
        return config


def test_a_table_of_layers(monkeypatch):
    monkeypatch.setitem(steps.NETS, 'short', (ShortNet, 'quickstart'))
    flags = argparse.Namespace(dtype='float32', rounds=1, sample_secs=0.001)
    monkeypatch.setattr(roofline, 'product_side', lambda: 64)
    monkeypatch.setattr(roofline, 'copy_bytes', lambda: 2**20)
    row = layers.measure('short', 4, flags)
    assert all(secs > 0 for piece in row['pieces'] for secs in piece['secs'])
    table = tables.layer_table(row).splitlines()
    rows = [
        line for line in table if line.startswith(('| conv', '| fc', '| all', '| sum', '| as '))
    ]
    assert len(rows) == len(row['pieces']) + 4


# ---------------------------------------------------------------------------- the file, the page


def step_row(net='2012', secs=(2.0, 4.0), **more) -> dict:
    """Return a row as `measure` makes it."""
    form = {'secs': list(secs), 'cpu_secs': list(secs), 'steps': 1, 'first_secs': 1.0}
    slow = form | {'secs': [2 * value for value in secs]}
    row = {'net': net, 'batch_size': 64, 'dtype': 'float32', 'pass': 'train', 'limit_secs': 1.5}
    row |= {'forms': {'ours': form, 'naive': slow, 'torch, NCHW, eager': slow}}
    row |= {'torch': 'torch, NCHW, eager', 'flops': 9e9, 'flops_per_sec': 6e9, 'bytes_per_sec': 1e9}
    row |= {'ratios': {'naive': 2.0, 'torch, NCHW, eager': 2.0}, 'commit': 'abc'}
    return (
        row
        | {'device': 'A box', 'platform': 'cpu', 'cpus': 2, 'jax': '1', 'flax': '1', 'python': '3'}
        | more
    )


def test_a_row_measured_again_replaces_the_old_one(tmp_path):
    for row in (step_row('2012'), step_row('torchvision'), step_row('2012', (7.0,))):
        path = results.keep(tmp_path, 'steps', row)
    assert [(row['net'], row['forms']['ours']['secs']) for row in results.read(path)['steps']] == [
        ('2012', [7.0]),
        ('torchvision', [2.0, 4.0]),
    ]
    assert path.name == f'{slug(metrics.device_name())}.json'


@pytest.mark.parametrize(
    ('net', 'here', 'kinds', 'turns'),
    [
        ('2012', True, 'ours,naive,torch', 'torch ours,naive ours,best'),
        ('2012', True, 'ours,torch', 'torch ours,best'),
        ('2012', True, 'torch', 'torch'),
        ('2012', True, 'ours', 'ours'),
        ('2012', True, 'ours,naive', 'ours,naive'),
        ('2012', False, 'ours,naive,torch', 'ours,naive'),
        ('2012', False, 'ours,torch', 'ours'),
        ('torchvision', True, 'ours,naive,torch', 'torch ours,best'),
        ('torchvision', False, 'ours,naive', 'ours'),
    ],
)
def test_each_kind_gets_a_turn_and_ours_is_beside_pytorch(monkeypatch, net, here, kinds, turns):
    best, ran = 'torch, NCHW, eager', []

    def alone(cpu_devices, function, net, batch_size, what, forms, flags):
        ran.append(','.join('best' if form == best else form for form in forms))
        names = [best if form == 'torch' else form for form in forms]
        row = {
            'forms': {name: len(ran) for name in names},
            'torch': best if best in names else None,
        }
        if 'ours' in names:
            row['ratios'] = dict.fromkeys(names[1:], len(ran))
        return row

    monkeypatch.setattr(baselines, 'torch_is_here', lambda: here)
    monkeypatch.setattr(steps, 'run_alone', alone)
    flags = argparse.Namespace(kinds=tuple(kinds.split(',')))
    row = steps.measure(net, 64, 'train', flags)
    assert ' '.join(ran) == turns
    assert row['torch'] == (best if 'torch' in turns else None)
    if 'ours' in kinds:
        assert row['forms']['ours'] == len(ran)
    names = {name for name, turn in (('naive', 'naive'), (best, 'best')) if turn in turns}
    assert row['ratios'] == {name: row['forms'][name] for name in names}


def test_a_process_of_its_own_has_the_devices_of_the_trainer():
    assert timing.run_alone(3, jax.device_count) == 3
    with pytest.raises(RunError, match='no net'):
        timing.run_alone(1, _fail)


def _fail() -> None:
    raise RunError('no net')


def test_the_page_shows_the_stored_rows(tmp_path):
    results.keep(tmp_path, 'steps', step_row())
    assert throughput.main(['--page', f'--out={tmp_path}']) == 0
    text = (tmp_path / 'tables.md').read_text()
    # Medians: 64 images in 3 s, PyTorch 6 s; the roofline is 1.5 s.
    assert '| 2012 | 64 | float32 | train | **21.3** | 16.0 to 32.0 | 10.7 (NCHW, eager) |' in text
    assert '| **2.00** | 10.7 | 2.00 | 42.7 | 50% | 3 | 2 |' in text
    row = ['2 x A box', '2012, float32', '64', 'train', '**21.3**', '10.7 (NCHW, eager)']
    assert tables.readme_rows(tmp_path) == [[*row, '**2.00**', '2.00', '50%']]
    assert text.endswith('## Time to accuracy\n\nnot run\n')


def test_without_pytorch_our_rows_stand_alone():
    row = step_row(torch=None, ratios={'naive': 2.0})
    del row['forms']['torch, NCHW, eager']
    assert '| **21.3** | 16.0 to 32.0 | not run | not run |' in tables.steps_table([row])


def test_the_page_in_the_repository_is_that_of_its_figures():
    if not (results.RESULTS / 'tables.md').exists():
        pytest.skip('nothing is stored yet: python -m experiments.throughput')
    assert (results.RESULTS / 'tables.md').read_text() == tables.page(results.RESULTS)


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['--nets=2013'], "'2013' is not one of 2012, 2012_without_LRN"),
        (['--rounds=0'], '0 must be at least 1'),
        (['--parts=all'], "'all' is not one of steps, layers"),
    ],
)
def test_a_wrong_flag_is_one_sentence(argv, message, capsys):
    assert throughput.main(argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count('\n') == 1


# ---------------------------------------------------------------------- feeding, start, accuracy


def tiny(data_dir: Path):
    """Return a small net on few images."""
    config = ShortNet.get_config('quickstart')
    config.data.update(data_dir=str(data_dir), train='train[:256]', test='test[:64]')
    config.data.validation = 'train[256:320]'
    config.loop.update(compilation_cache='none', tensorboard=False, log_every_steps=1)
    return config


def test_feeding_runs_the_trainers_loop_and_counts_its_waiting(data_dir, tmp_path, monkeypatch):
    samples, real = [], input_pipeline.real

    def observed(job, state, steps):
        before = int(state.step)
        state, secs, waiting_secs = real(job, state, steps)
        samples.append((int(state.step) - before, steps, waiting_secs / secs / steps))
        return state, secs, waiting_secs

    monkeypatch.setattr(input_pipeline, 'real', observed)
    row = input_pipeline.feed(tiny(data_dir), tmp_path, rounds=2, sample_secs=0.001)
    assert len(row['real_secs']) == len(row['resident_secs']) == 2
    assert [done for done, *_ in samples] == [asked for _, asked, _ in samples]
    assert row['stall_share'] == pytest.approx([share for *_, share in samples[1:]])
    assert all(0 < share < 1 for share in row['stall_share'])


def test_stored_images_are_read_back(tmp_path):
    input_pipeline.write_stored_images(tmp_path, 6)
    found = datasets.load(input_pipeline.STORED, tmp_path, 'train')
    assert found.images.shape == (6, 256, 256, 3)
    assert sorted(found.labels) == list(range(6))


def test_the_first_step_of_a_process(data_dir, tmp_path):
    more = (f'--config.data.data_dir={data_dir}', "--config.model.layers=('conv1', 'fc8')")
    assert input_pipeline.first_step_secs('configs/smoke.py', tmp_path, 'cold', more) > 0
    assert list((tmp_path / 'cache').iterdir())  # for the next start


def test_time_to_accuracy(tmp_path):
    """Check an accuracy reached half-way between two records, at 15 s, and one not reached."""
    for name, error in (('time_to_accuracy', 0.114), ('time_to_accuracy_2', 0.116)):
        folder = tmp_path / name
        folder.mkdir()
        config = {'name': 'alexnet', 'scale': 'fashion_mnist', 'model': {'compute_dtype': 'half'}}
        (folder / 'config.json').write_text(json.dumps(config))
        (folder / 'environment.json').write_text('{"device": "box"}')
        records = [
            {'kind': 'train', 'step': 100, 'secs': 10.0},
            {'kind': 'validation', 'step': 100, 'epoch': 1.0, 'top1_error': 0.2},
            {'kind': 'validation', 'step': 150, 'epoch': 1.5, 'top1_error': error},
            {'kind': 'train', 'step': 200, 'secs': 20.0},
        ]
        (folder / 'metrics.jsonl').write_text(lines(records))
    table = tables.page(tmp_path / 'throughput').partition('## Time to accuracy')[2]
    assert '| alexnet:fashion_mnist, half | box | 0.8850 | 15.0 | 2 | 0.8860 |' in table
    assert '| box | 0.8850 | not reached |  | 0.8840 |' in table
