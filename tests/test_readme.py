"""README and docs: generated parts match the logs, commands parse, code runs, links resolve."""

import argparse
import importlib
import itertools
import json
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from PIL import Image

import main
from alexnet_jax import config, config_file
from alexnet_jax.training import train
from configs import alexnet
from experiments import readme, run_archive

ROOT = readme.ROOT
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob('*.md'), *ROOT.glob('docs/*.md'))
)  # fmt: skip
BLOCK = re.compile(r'^```(\w*)\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding='utf-8')


@pytest.mark.parametrize('page', readme.PAGES)
def test_generated_parts_are_those_of_the_logs(page):
    assert readme.filled(page) == text_of(page), 'run `python -m experiments.readme`'


def test_readme_is_short():
    text = text_of('README.md')
    assert len(text.splitlines()) <= 150
    assert len(text) <= 9_000


# ------------------------------------------------------------------------------------------- links


def anchors(page: str) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    titles = re.findall(r'^#+ (.*)$', BLOCK.sub('', text_of(page)), re.MULTILINE)
    return {re.sub(r'[^\w -]', '', title.lower()).replace(' ', '-') for title in titles}


@pytest.mark.parametrize('page', PAGES)
def test_links_resolve(page):
    prose = BLOCK.sub('', text_of(page))
    for link in re.findall(r'\]\((?!https?:)([^)\s]+)\)', prose):
        file, _, anchor = link.partition('#')
        target = ((ROOT / page).parent / file).resolve() if file else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.relative_to(ROOT).as_posix()), link


@pytest.mark.parametrize('page', PAGES)
def test_files_named_in_the_text_exist(page):
    prose = BLOCK.sub('', text_of(page))
    for file in re.findall(r'`([\w./-]+/[\w.-]+\.(?:py|md|sh|yaml|toml))`', prose):
        if 'NAME' not in file:
            assert any((folder / file).is_file() for folder in (ROOT, ROOT / 'alexnet_jax')), file


# ---------------------------------------------------------------------------------------- commands


def commands(page: str) -> Iterator[list[str]]:
    """Yield the words of every command in a page: lines of code blocks, and code in the text."""
    text = text_of(page)
    lines = [line for _, body in BLOCK.findall(text) for line in body.splitlines()]
    lines += [' '.join(code.split()) for code in re.findall(r'`([^`]+)`', BLOCK.sub('', text))]
    for line in lines:
        if re.match(r'(\$ )?(python|make|pip|srun|mpirun|sbatch|\.venv/bin/python)( |$)', line):
            yield shlex.split(line.removeprefix('$ '), comments=True)


class ParsedError(Exception):
    """A command line has been parsed; nothing has been done."""


def check_main(words: list[str]) -> None:
    """Parse the flags of main.py, and resolve and validate the config that they name."""
    others, overrides = config_file.split(word for word in words if word != '--help')
    flags = main.parser().parse_args(others)
    if flags.config and flags.config.partition(':')[0].endswith('.py'):
        config.unpack(config_file.load(str(ROOT / flags.config), overrides))


def check_module(module: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command up to the point where its command line has been parsed, or its help printed."""
    parse = argparse.ArgumentParser.parse_args
    end = SystemExit if '--help' in words else ParsedError

    def parse_and_stop(self, args=None, namespace=None):
        parse(self, args, namespace)
        raise ParsedError

    run = importlib.import_module(module).main
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, 'parse_args', parse_and_stop)
        patch.setattr(sys, 'argv', [module, *words])
        with pytest.raises(end):
            run()


def check(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that a command exists and takes these words."""
    match words:
        case ['srun' | 'mpirun', *_]:
            if 'python' in words:
                check(words[words.index('python') :], monkeypatch)
        case ['sbatch', *_]:
            script = next(word for word in words if word.endswith('.sh'))
            assert (ROOT / script).is_file()
            check_main(words[words.index(script) + 1 :])
        case ['make', *targets]:
            phony = re.search(r'^\.PHONY: (.*)$', text_of('Makefile'), re.MULTILINE)
            assert phony is not None
            assert {*targets} <= {*phony[1].split()}
        case ['pip', 'install', *_]:
            extras = tomllib.loads(text_of('pyproject.toml'))['project']['optional-dependencies']
            asked = re.findall(r'\[([\w,]+)\]', ' '.join(words))
            assert {name for names in asked for name in names.split(',')} <= {*extras}
        case [_, '-m', 'pytest', *files]:
            assert all((ROOT / file).is_file() for file in files)
        case [_, '-m', 'experiments.readme', *flags]:
            assert flags in ([], ['--check'])
        case [_, '-m', module, *rest]:
            package = (ROOT / module.replace('.', '/')).is_dir()
            check_module(f'{module}.__main__' if package else module, rest, monkeypatch)
        case [_, 'main.py', *rest]:
            check_main(rest)
        case [_, file, *rest]:
            assert (ROOT / file).is_file()
            check_module(file.removesuffix('.py').replace('/', '.'), rest, monkeypatch)
        case _:
            raise AssertionError(f'no check for {words}')


@pytest.mark.parametrize('page', PAGES)
def test_commands_exist_and_take_their_flags(page, monkeypatch):
    monkeypatch.setenv('XLA_PYTHON_CLIENT_MEM_FRACTION', '0.5')  # experiments.throughput sets it
    for words in commands(page):
        try:
            check(words, monkeypatch)
        except (Exception, SystemExit, pytest.fail.Exception) as error:
            raise AssertionError(f'{page}: {" ".join(words)}: {error!r}') from error


# --------------------------------------------------------------------------------- code and tables


def python_blocks(page: str) -> list[str]:
    return [body for language, body in BLOCK.findall(text_of(page)) if language == 'python']


@pytest.mark.parametrize('page', ['README.md', 'docs/tools.md'])
def test_python_code_runs(page, smoke_run, tmp_path):
    (code,) = python_blocks(page)
    own = np.random.default_rng(0)
    names: dict[str, Any] = {
        'pixels': own.normal(0, 60, (2, 224, 224, 3)).astype(np.float32),
        'images': own.integers(0, 256, (3, 28, 28, 1), np.uint8),
    }
    photo = tmp_path / 'photo.jpg'
    Image.fromarray(own.integers(0, 256, (40, 60, 3), np.uint8)).save(photo)
    assert 'workdirs/alexnet-quickstart-0' in code
    code = code.replace('workdirs/alexnet-quickstart-0', str(smoke_run))
    exec(code.replace('photo.jpg', str(photo)), names)
    assert names['probabilities'].shape == (3, 10)
    np.testing.assert_allclose(names['probabilities'].sum(axis=1), 1, rtol=1e-5)
    if 'vectors' in code:
        assert names['vectors'].shape[0] == 1
    if 'logits' in code:
        assert names['logits'].shape == (2, 1000)


def test_the_layer_shown_is_the_one_of_the_config():
    (code,) = python_blocks('docs/configs.md')
    names: dict[str, Any] = {}
    exec(code, names)
    assert names['conv2'] == alexnet.get_config('imagenet2012').model.conv2.to_dict()


def leaves(tree: Mapping[str, Any], prefix: str = '') -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of a config, without the layer table."""
    for key, value in tree.items():
        if not isinstance(value, Mapping):
            yield prefix + key, value
        elif 'reads' not in value:
            yield from leaves(value, f'{prefix}{key}.')


def test_every_key_is_documented_with_its_value():
    values = dict(leaves(alexnet.get_config('imagenet2012').to_dict()))
    section = text_of('docs/configs.md').partition('## Keys')[2]
    found: dict[str, str] = {}
    for keys, cell in re.findall(r'^\| (`[\w.]+`.*?) \| (.*?) \| .* \|$', section, re.MULTILINE):
        names = [name.strip('`') for name in keys.split(', ')]
        group = names[0].rpartition('.')[0]
        shown = re.findall(r'`(.*?)`', cell) or ['']
        for name, value in itertools.zip_longest(names, shown, fillvalue=''):
            found[group + name if name.startswith('.') else name] = value
    wanted = {
        key: repr(value)
        for key, value in values.items()
        if not key.startswith(('optimizer.weights', 'optimizer.biases'))
    }
    assert wanted.keys() <= found.keys()
    assert {key: found[key] for key in wanted} == wanted


def test_every_flag_of_main_is_documented():
    section = text_of('docs/configs.md').partition('## Flags of main.py')[2].partition('##')[0]
    rows = re.findall(r'^\| (`--.*?) \| ', section, re.MULTILINE)
    documented = {flag for row in rows for flag in re.findall(r'(--\w+)', row)}
    known = {flag for action in main.parser()._actions for flag in action.option_strings}
    assert documented == {flag.partition('.')[0] for flag in known} - {'-h', '--help'}


def test_every_module_is_described():
    page = text_of('docs/architecture.md').partition('## Imports')[0]
    rows = dict(re.findall(r'^\| `(?:alexnet_jax/` itself|([\w/]+)/`.*?) \| (.*) \|$', page, re.M))
    for path in (ROOT / 'alexnet_jax').rglob('*.py'):
        if path.name != '__init__.py':
            folder = path.parent.relative_to(ROOT / 'alexnet_jax').as_posix()
            assert f'`{path.stem}`' in rows['' if folder == '.' else folder], path


def test_the_summary_shown_is_the_one_that_training_prints(smoke_run, tmp_path):
    workdir = tmp_path / 'run'
    shutil.copytree(smoke_run, workdir)
    run_config = json.loads((workdir / 'config.json').read_text())
    printed = train.run(run_config, workdir)  # it is finished: this evaluates it again
    assert printed.startswith(readme.summary(run_archive.read_run(workdir)))


def test_every_file_of_a_workdir_is_described(smoke_run):
    page = text_of('docs/reproducibility.md').partition('## The workdir')[2]
    for path in smoke_run.iterdir():
        if not path.name.startswith('.'):
            assert f'`{path.name}' in page, path.name
