"""Metrics of a run, also after a crash in the middle of a line."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from alexnet_jax.training import metrics


def test_means_weigh_uneven_batches():
    history = metrics.History()
    history.add({'loss': (8.0, 4)})
    history.add({'loss': (1.0, 1)})
    assert history.take_means() == {'loss': 9 / 5}
    assert history.take_means() == {}


def test_means_go_through_json():
    history = metrics.History()
    history.add({'loss': (0.1, 4), 'top1_error': (3, 4)})
    again = metrics.History(**json.loads(json.dumps(dataclasses.asdict(history))))
    assert again.take_means() == history.take_means()


def test_resuming_drops_later_records_and_a_torn_line(tmp_path):
    writer = metrics.MetricWriter(tmp_path, 0, tensorboard=False)
    for step in (1, 2, 3):
        writer.write('train', step, loss=float(step))
    writer.close()
    with (tmp_path / 'metrics.jsonl').open('a') as file:
        file.write('[]\n\xff{}\n{"loss": 1}\n{"kind": "train", "st')
    assert [record['step'] for record in metrics.read(tmp_path)] == [1, 2, 3]
    writer = metrics.MetricWriter(tmp_path, 2, tensorboard=False)
    writer.write('train', 3, loss=9.0)
    writer.close()
    assert [record['loss'] for record in metrics.read(tmp_path)] == [1.0, 2.0, 9.0]


def test_tensorboard_reads_the_same_values(tmp_path):
    pytest.importorskip('tensorboardX')
    writer = metrics.MetricWriter(tmp_path, 0, tensorboard=True)
    writer.write('train', 7, loss=0.5, note='words are left out')
    writer.close()
    files = list((tmp_path / 'tensorboard').iterdir())
    assert len(files) == 1
    assert b'train/loss' in files[0].read_bytes()


def test_tensorboard_does_not_bring_pytorch_along(tmp_path):
    """Its import takes longer than all else of a start."""
    pytest.importorskip('tensorboardX')
    script = (
        'import pathlib, sys\n'
        'from alexnet_jax.training import metrics\n'
        f'writer = metrics.MetricWriter(pathlib.Path({str(tmp_path)!r}), 0, tensorboard=True)\n'
        'writer.write("train", 1, loss=0.5); writer.close()\n'
        'print("tensorboardX" in sys.modules, "torch" in sys.modules)'
    )
    err = subprocess.check_output([sys.executable, '-c', script], text=True)
    assert err == 'True False\n'


def test_the_commit_is_that_of_this_code_or_unknown(tmp_path):
    """A package inside somebody else's repository, untracked there, has no commit."""
    git = ('git', '-c', 'user.name=a', '-c', 'user.email=a', '-C', str(tmp_path))
    code = tmp_path / 'lib' / 'alexnet_jax'
    shutil.copytree(Path(metrics.__file__).parents[1], code)
    subprocess.run([*git, 'init', '-q'], check=True)
    subprocess.run([*git, 'commit', '-q', '--allow-empty', '-m', 'theirs'], check=True)
    script = (
        f'import sys; sys.path.insert(0, {str(code.parent)!r})\n'
        'from alexnet_jax.training import metrics\n'
    )
    script += f'assert metrics.__file__.startswith({str(code)!r}); print(metrics.commit())'
    ask = [sys.executable, '-c', script]
    assert subprocess.check_output(ask, text=True) == 'unknown\n'
    subprocess.run([*git, 'add', '.'], check=True)
    subprocess.run([*git, 'commit', '-q', '-m', 'ours'], check=True)
    head = subprocess.check_output([*git, 'rev-parse', 'HEAD'], text=True)
    assert subprocess.check_output(ask, text=True) == head
