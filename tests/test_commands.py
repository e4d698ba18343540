"""Test python -m alexnet_jax COMMAND, and rules that import-linter cannot check."""

import subprocess
import sys

import pytest

from alexnet_jax import __main__ as commands
from alexnet_jax import command
from alexnet_jax.errors import RunError


def test_main_is_short(repository):
    assert len((repository / 'main.py').read_text().splitlines()) <= 80


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit, match='0'):
        commands.main(['--help'])
    listed = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    for name, (_, about) in commands.COMMANDS.items():
        assert [name, about] in listed


@pytest.mark.parametrize('name', commands.COMMANDS)
def test_each_command_has_help(name, capsys):
    with pytest.raises(SystemExit, match='0'):
        commands.main([name, '--help'])
    assert capsys.readouterr().out.startswith(f'usage: python -m alexnet_jax {name} ')


@pytest.mark.parametrize(
    ('words', 'expected_text'),
    [
        (['predikt'], "argument COMMAND: invalid choice: 'predikt'"),
        ([], 'the following arguments are required: COMMAND'),
        (['predict'], 'the following arguments are required: IMAGE, --workdir'),
    ],
)
def test_usage_errors(words, expected_text, capsys):
    assert commands.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected_text in line
    assert 'python -m alexnet_jax' in line


def test_a_fault_of_jax_is_not_blamed_on_a_variable_that_is_not_set(monkeypatch):
    monkeypatch.delenv('JAX_PLATFORMS', raising=False)
    code = compile('raise RuntimeError("no backend")', 'jax/_src/xla_bridge.py', 'exec')
    with pytest.raises(RuntimeError, match='no backend') as caught:
        exec(code)
    with pytest.raises(RuntimeError, match='no backend'):
        command.report(caught.value, 'x')
    monkeypatch.setenv('JAX_PLATFORMS', 'cuda')
    assert command.report(caught.value, 'x') == 2


def test_our_own_sentence_is_printed_as_it_is(capsys):
    assert command.report(RunError('the log contains RESOURCE_EXHAUSTED.'), 'x') == 1
    assert capsys.readouterr().err == 'x: the log contains RESOURCE_EXHAUSTED.\n'


def test_a_table_is_aligned():
    rows = [('image', 'class'), ('a long name.png', ''), ('b', '[/b] bag')]
    assert command.table(rows).splitlines() == [
        'image            class',
        '-------------------------',
        'a long name.png',
        'b                [/b] bag',
    ]


def test_preparing_data_imports_no_jax(repository):
    script = (
        'import sys; from alexnet_jax import __main__\n'
        'try: __main__.main(["prepare", "--help"])\n'
        'except SystemExit: sys.exit("jax" in sys.modules)'
    )
    subprocess.run([sys.executable, '-c', script], cwd=repository, check=True, capture_output=True)
