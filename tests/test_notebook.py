"""The notebook is committed without outputs, and sets constants that the scripts have. .ci/run executes it."""

import ast
import json
from pathlib import Path

NOTEBOOK = Path(__file__).parents[1] / "docs" / "quickstart.ipynb"


def code_cells() -> list[dict]:
    return [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def test_no_output_is_committed():
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code_cells())


def test_one_cell_holds_what_is_to_be_changed_and_its_names_are_used():
    (parameters,) = [cell for cell in code_cells() if "parameters" in cell["metadata"].get("tags", [])]
    tree = ast.parse("".join(parameters["source"]))
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    rest = " ".join("".join(cell["source"]) for cell in code_cells() if cell is not parameters)
    assert names and all(name in rest for name in names)
