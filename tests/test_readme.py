"""The README says what the logs say, and names commands and files that are there."""

import re

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
