"""README and docs have the figures of the logs, and name commands and files that exist."""

import re

import numpy as np
import pytest

from experiments import readme

PAGES = ['README.md', *sorted(f'docs/{p.name}' for p in (readme.ROOT / 'docs').glob('*.md'))]


@pytest.mark.parametrize('page', readme.PAGES)
def test_figures_are_those_of_the_logs(page):
    text = (readme.ROOT / page).read_text()
    assert readme.filled(page) == text, 'run `python -m experiments.readme`'


@pytest.mark.parametrize('page', PAGES)
def test_configs_modules_and_links_it_names_exist(page):
    text = (readme.ROOT / page).read_text()
    for config in re.findall(r'--config=(configs/\w+\.py)', text):
        assert (readme.ROOT / config).is_file(), config
    for module in re.findall(r'python -m ([\w.]+)', text):
        path = readme.ROOT / module.replace('.', '/')
        assert path.with_suffix('.py').is_file() or (path / '__main__.py').is_file(), module
    for link in re.findall(r'\]\((?!https?:|#)([\w.][^)#]*)[^)]*\)', text):
        assert ((readme.ROOT / page).parent / link).exists(), link


def test_its_python_does_what_it_says(smoke_run, data_dir):
    code, *_ = re.findall(
        r'```python\n(.*?)```', (readme.ROOT / 'README.md').read_text(), re.DOTALL
    )
    own = np.random.default_rng(0)
    names = {
        'pixels': own.normal(0, 60, (2, 224, 224, 3)).astype(np.float32),
        'images': own.integers(0, 256, (3, 28, 28, 1), np.uint8),
    }
    assert 'workdirs/alexnet-quickstart-0' in code
    exec(code.replace('workdirs/alexnet-quickstart-0', str(smoke_run)), names)
    assert names['logits'].shape == (2, 1000)
    assert names['probabilities'].shape == (3, 10)
    np.testing.assert_allclose(names['probabilities'].sum(axis=1), 1, rtol=1e-5)
