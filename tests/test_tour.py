"""examples/tour.ipynb: executed from the first cell to the last, and stored as git wants it."""

import nbformat
import pytest
from nbclient import NotebookClient

from alexnet_jax.training import train
from tests.conftest import REPOSITORY, smoke_config

NOTEBOOK = REPOSITORY / 'examples' / 'tour.ipynb'


@pytest.fixture(scope='module')
def ablation(data_dir, tmp_path_factory):
    config = smoke_config(data_dir)
    config.name, config.seed, config.epochs = 'ablation_overlap', 1, 1.0
    config.model.pool.window_px, config.model.pool.rounding = 2, 'up'
    workdir = tmp_path_factory.mktemp('runs') / 'overlap'
    train.run(config, workdir)
    return workdir


def text_of(cell) -> str:
    return ''.join(output.get('text', '') for output in cell.get('outputs', ()))


def test_the_tour_runs_from_start_to_end(smoke_run, ablation, data_dir, cache_dir, monkeypatch):
    monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(cache_dir))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = [c for c in notebook.cells if 'parameters' in c.metadata.get('tags', ())]
    for old, new in (
        ('../workdirs/alexnet-quickstart-0', smoke_run),
        ('../workdirs/ablation_overlap-quickstart-0', ablation),
        ('../data', data_dir),
    ):
        assert old in parameters.source
        parameters.source = parameters.source.replace(old, str(new))
    client = NotebookClient(
        notebook, timeout=600, resources={'metadata': {'path': NOTEBOOK.parent}}
    )
    client.execute()
    code = [cell for cell in notebook.cells if cell.cell_type == 'code']
    printed = '\n'.join(map(text_of, code))
    assert 'step 8, 10 classes' in printed
    assert 'difference of a probability' in printed
    pictures = [o for cell in code for o in cell.outputs if 'image/png' in o.get('data', {})]
    assert len(pictures) == 4
    assert not [o for cell in code for o in cell.outputs if o.get('name') == 'stderr']


def test_the_stored_outputs_are_complete_and_small():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == 'code']
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert '/tmp' not in NOTEBOOK.read_text()
    assert NOTEBOOK.stat().st_size < 300_000
