"""Pack what experiments/gpu.py needs on a machine with a GPU, Python 3.12, JAX and no network.

    python -m experiments.gpu_bundle         # makes gpu_bundle/, under 64 MiB
    bash gpu_bundle/start.sh [RESULTS.tar.gz] [flags of experiments.gpu]     # there, from the root

The machine is expected to have jax with CUDA, flax, optax, orbax-checkpoint, rich, scipy and
pillow. If PyTorch is installed, it is compared as well.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUNDLE = ROOT / 'gpu_bundle'
MOST_BYTES = 64 << 20
PYTHON = '3.12'
WHEELS = (
    'absl-py', 'array-record', 'dm-tree', 'docstring-parser', 'etils', 'googleapis-common-protos',
    'immutabledict', 'importlib-resources', 'ml-collections', 'simplejpeg', 'six',
    'tensorboardx', 'tensorflow-datasets', 'tensorflow-metadata', 'termcolor', 'toml',
)  # fmt: skip
SOURCES = ('promise',)  # published without a wheel, in pure Python
PLATFORMS = ('manylinux_2_28_x86_64', 'manylinux_2_17_x86_64', 'manylinux2014_x86_64')
START = """#!/bin/bash
# Install the wheels, and run experiments/gpu.py with the remaining arguments.
set -e
site=$(mktemp -d)
python3 -m pip install --quiet --no-index --no-deps --no-compile --target "$site" \\
  gpu_bundle/wheels/*.whl
export PYTHONPATH="$site" GIT_DIR="$PWD/gpu_bundle/git" GIT_WORK_TREE="$PWD"
git config --global --add safe.directory '*' && git reset --quiet || true
mkdir -p data
[ -e data/fashion_mnist ] || cp -r gpu_bundle/fashion_mnist data/
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader || true
exec python3 -u -m experiments.gpu --archive="${1:-results.tar.gz}" "${@:2}"
"""


def run(*words: str) -> None:
    """Run a command in the repository's root."""
    subprocess.run(words, cwd=ROOT, check=True)


def wheels(folder: Path) -> None:
    """Download the wheels, in the versions of constraints.txt."""
    pip = (sys.executable, '-m', 'pip', '--quiet', '--disable-pip-version-check')
    platforms = [f'--platform={name}' for name in PLATFORMS]
    binary = ('--only-binary=:all:', f'--python-version={PYTHON}', '--implementation=cp')
    run(*pip, 'download', '--no-deps', *binary, *platforms, f'--dest={folder}', *pinned(WHEELS))
    run(*pip, 'wheel', '--no-deps', f'--wheel-dir={folder}', *pinned(SOURCES))


def pinned(names: tuple[str, ...]) -> list[str]:
    """Return 'name==version' of each."""
    text = (ROOT / 'constraints.txt').read_text()
    versions = dict(re.findall(r'^([\w-]+)==([\w.]+)', text, re.M))
    return [f'{name}=={versions[name]}' for name in names]


def main() -> None:
    """Make the bundle, and print its size."""
    shutil.rmtree(BUNDLE, ignore_errors=True)
    wheels(BUNDLE / 'wheels')
    data = ROOT / 'data' / 'fashion_mnist'
    shutil.copytree(data, BUNDLE / 'fashion_mnist')
    run('git', 'clone', '--quiet', '--bare', '--depth=1', f'file://{ROOT}', str(BUNDLE / 'git'))
    run('git', f'--git-dir={BUNDLE / "git"}', 'config', 'core.bare', 'false')
    (BUNDLE / 'start.sh').write_text(START)
    size = sum(path.stat().st_size for path in BUNDLE.rglob('*') if path.is_file())
    if size > MOST_BYTES:
        sys.exit(f'gpu_bundle: {size / 2**20:.0f} MiB, more than {MOST_BYTES / 2**20:.0f}.')
    print(f'{BUNDLE.relative_to(ROOT)}: {size / 2**20:.0f} MiB; bash gpu_bundle/start.sh')


if __name__ == '__main__':
    main()
