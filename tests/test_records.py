"""What a run says of itself, also after a crash in the middle of a line."""

import json
import subprocess
import sys

import pytest
from rich.console import Console

from alexnet_jax import records


def test_means_weigh_uneven_batches():
    means = records.Means()
    means.add({'loss': (8.0, 4)})
    means.add({'loss': (1.0, 1)})
    assert means.take() == {'loss': 9 / 5}
    assert means.take() == {}


def test_means_go_through_json():
    means = records.Means()
    means.add({'loss': (0.1, 4), 'top1_error': (3, 4)})
    again = records.Means(json.loads(json.dumps(means.sums)))
    assert again.take() == means.take()


def test_resuming_drops_later_records_and_a_torn_line(tmp_path):
    book = records.Records(tmp_path, 0, tensorboard=False)
    for step in (1, 2, 3):
        book.write('train', step, loss=float(step))
    book.close()
    with (tmp_path / 'metrics.jsonl').open('a') as file:
        file.write('{"kind": "train", "st')
    assert [record['step'] for record in records.read(tmp_path)] == [1, 2, 3]
    book = records.Records(tmp_path, 2, tensorboard=False)
    book.write('train', 3, loss=9.0)
    book.close()
    assert [record['loss'] for record in records.read(tmp_path)] == [1.0, 2.0, 9.0]


def test_tensorboard_reads_the_same_values(tmp_path):
    pytest.importorskip('tensorboardX')
    book = records.Records(tmp_path, 0, tensorboard=True)
    book.write('train', 7, loss=0.5, note='words are left out')
    book.close()
    files = list((tmp_path / 'tensorboard').iterdir())
    assert len(files) == 1
    assert b'train/loss' in files[0].read_bytes()


def test_tensorboard_does_not_bring_pytorch_along(tmp_path):
    """Its import takes longer than all else of a start."""
    pytest.importorskip('tensorboardX')
    script = (
        'import pathlib, sys\n'
        'from alexnet_jax import records\n'
        f'book = records.Records(pathlib.Path({str(tmp_path)!r}), 0, tensorboard=True)\n'
        'book.write("train", 1, loss=0.5); book.close()\n'
        'print("tensorboardX" in sys.modules, "torch" in sys.modules)'
    )
    said = subprocess.check_output([sys.executable, '-c', script], text=True)
    assert said == 'True False\n'


def test_plain_lines_when_not_a_terminal(capsys):
    bar = records.ProgressBar(100, 0)
    bar.step(1)
    bar.log(50, 1.25, 400.0, 75.0)
    bar.line('epoch 1.00')
    bar.close()
    assert capsys.readouterr().err.splitlines() == [
        'step 50/100  loss 1.2500  400 images/s  1:15 left',
        'epoch 1.00',
    ]


def test_a_bar_on_a_terminal():
    console = Console(force_terminal=True, width=100, record=True)
    bar = records.ProgressBar(100, 0, console)
    bar.log(50, 1.25, 400.0, 75.0)
    bar.step(50)
    bar.close()
    assert '50/100' in console.export_text()
    assert bar._bar is not None
