"""examples/tour.ipynb: executed from the first cell to the last, and stored as git wants it."""

import nbformat
from nbclient import NotebookClient

from tests.conftest import REPOSITORY

NOTEBOOK = REPOSITORY / 'examples' / 'tour.ipynb'


def text_of(cell) -> str:
    return ''.join(output.get('text', '') for output in cell.get('outputs', ()))


def test_the_tour_runs_from_start_to_end(smoke_run, data_dir):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = [c for c in notebook.cells if 'parameters' in c.metadata.get('tags', ())]
    for old, new in (
        ('../workdirs/alexnet-quickstart-0', smoke_run),
        ("'../data'", f"'{data_dir}'"),
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
    assert 'pooling windows do not overlap' in printed


def test_the_stored_outputs_are_complete_and_small():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == 'code']
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert '/tmp' not in NOTEBOOK.read_text()
    assert NOTEBOOK.stat().st_size < 300_000
