# Two commands do everything, each alone, on a machine with Python 3.11 and make:
#   make        environment, data, then the main job: the two-tower AlexNet, trained and evaluated
#   make test   environment, data, lint, types, tests

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
CODE := alexnet_jax configs examples experiments tests main.py
TYPED := alexnet_jax configs examples main.py
DATA := data/fashion_mnist
# pep517: else a pip of before 23.1 warns that `promise` (tensorflow-datasets wants it) has only a setup.py.
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --use-pep517 -c constraints.txt -e

.PHONY: quickstart env data test lint types tests test-torch test-newest test-browser test-cluster golden table gpu clean

quickstart: data
	$(BIN)/python main.py --config=configs/alexnet.py

env: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || $(PYTHON) -m virtualenv $(VENV) || \
	  { echo "No virtual environment: install Debian's python3-venv, or pip install virtualenv"; exit 1; }
	$(INSTALL) '.[dev]'
	@touch $@

data: env $(DATA)

$(DATA):
	$(BIN)/python -m alexnet_jax prepare fashion_mnist --data_dir=data

test: lint types tests

lint: env
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/lint-imports --no-cache
	$(BIN)/python tests/words.py

types: env
	$(BIN)/ty check --python $(VENV) $(TYPED)

tests: data
	$(BIN)/python -m pytest -n 4 --dist=loadfile --no-loadscope-reorder

# Compare the net with PyTorch. Unless pip uses a CPU-only index, this downloads gigabytes.
test-torch: data
	$(INSTALL) '.[dev,torch]'
	$(BIN)/python -m pytest tests/test_torch.py tests/test_weights.py tests/test_throughput.py

# A quick subset with the newest version of everything on Python 3.13; skipped without Python 3.13.
test-newest: data
	.ci/newest

# The report in a real headless Chromium, Debian's.
test-browser: data
	@command -v chromium > /dev/null || apt-get install --yes --no-install-recommends chromium
	$(BIN)/python -m pytest tests/browser/test_report_in_chromium.py

# A real Slurm on this machine, and Open MPI: as root, on Debian; about eight minutes.
test-cluster: data
	$(INSTALL) '.[dev,cluster]'
	$(BIN)/python -m pytest tests/cluster/test_slurm.py tests/cluster/test_sweep_slurm.py tests/cluster/test_kubernetes.py

# The resolved configs as text: look at the difference before committing it.
golden: env
	$(BIN)/python -m tests.golden.configs

# The contribution table: the base and every ablation, twenty seeds; the rates of rows that do not train
# at the base's; bfloat16. Many hours on a CPU; the same command resumes.
TABLE := contribution_table contribution_rates contribution_bfloat16
table: data
	for sweep in $(TABLE); do $(BIN)/python -m experiments.sweep $$sweep --seeds=20 --parallel=2 || exit 1; done
	$(BIN)/python -m experiments.contribution_table --runs $(TABLE:%=workdirs/%-quickstart)

# Everything that needs a GPU, most important first; see experiments/gpu.py.
gpu: data
	$(BIN)/python -m experiments.gpu

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
