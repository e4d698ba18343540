"""Test the output of progress on a terminal and in a log."""

from rich.console import Console

from alexnet_jax import progress
from alexnet_jax.progress import ProgressBar


def test_plain_lines_when_not_a_terminal(capsys):
    bar = ProgressBar(100)
    bar.to(1)
    bar.to(50, 'loss 1.2500')
    bar.line('epoch 1.00 [/b]')
    bar.close()
    assert bar.plain
    assert capsys.readouterr().err == 'epoch 1.00 [/b]\n'


def test_a_bar_on_a_terminal():
    console = Console(force_terminal=True, width=100, record=True)
    bar = ProgressBar(100, 0, console=console)
    bar.to(50, 'loss 1.2500  data train[:50]')
    bar.line('of train[:50] [/b]')
    bar.close()
    text = console.export_text()
    assert 'loss 1.2500  data train[:50]' in text
    assert 'of train[:50] [/b]' in text


def test_preparation_prints_lines_when_not_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(progress, 'LOG_EVERY_SECS', 0)
    with progress.progress('reading', 4000) as update:
        update(1000)
        update(3000)
    assert capsys.readouterr().err.endswith('reading: 3,000 of 4,000 (75%)\n')
