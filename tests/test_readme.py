"""The README says what the logs say, and names commands and files that are there."""

import re

import numpy as np

from experiments import readme


def test_figures_are_those_of_the_logs():
    text = (readme.ROOT / 'README.md').read_text()
    assert readme.filled(text) == text, 'run `python -m experiments.readme`'


def test_configs_and_modules_it_names_exist():
    text = (readme.ROOT / 'README.md').read_text()
    for config in re.findall(r'--config=(configs/\w+\.py)', text):
        assert (readme.ROOT / config).is_file(), config
    for module in re.findall(r'python -m ([\w.]+)', text):
        assert (readme.ROOT / (module.replace('.', '/') + '.py')).is_file(), module
    for link in re.findall(r'\]\((?!https?:)(\w[^)]*)\)', text):
        assert (readme.ROOT / link).exists(), link


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
