"""The notebooks run from top to bottom, were committed as they ran, and hold no logic."""

import ast
import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

FOLDER = Path(__file__).parents[1] / "notebooks"
REPOSITORY = "bn-research/bn_research"
LARGEST = 400_000  # bytes; GitHub and Colab open these at once

# What the cell tagged "parameters" is replaced with: every name that it sets, small.
SMOKE = {
    "01_the_transform": "BATCH, POINTS = 32, 7",
    "02_initialization": "NETWORK, EXAMPLES, STEPS, SEEDS = 'c4 P f8 f10', 64, 4, 1",
    "03_scale_invariance": "NETWORK, EXAMPLES, STEPS, SCALES = 'f8 f10', 160, 10, 2",
    "04_bring_your_own_model": "SPLITS, STEPS, BATCH = ('train[:128]', 'test[:64]'), 5, 32",
}
# Statements that hold logic; those of a figure may stand in a loop that is not nested.
LOGIC = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.While, ast.If, ast.Try)
YOURS = {"03_scale_invariance", "04_bring_your_own_model"}  # where the reader's network stands

each = pytest.mark.parametrize("name", SMOKE)


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def tags_of(cell):
    return cell.metadata.get("tags", [])


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def parsed(source):
    """The source without IPython's magics."""
    return ast.parse(re.sub(r"^(\s*)%.*$", r"\1pass", source, flags=re.MULTILINE))


def names_set(source):
    return {
        node.id
        for node in ast.walk(parsed(source))
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }


def is_install(cell):
    return "%pip install" in cell.source


def logic_in(source):
    """What a cell that only calls the library and draws would not hold, as text."""
    wrong = []
    for node in ast.walk(parsed(source)):
        if isinstance(node, LOGIC):
            wrong.append(type(node).__name__)
        if isinstance(node, ast.For):
            inner = [child for part in node.body for child in ast.walk(part)]
            nested = [child for child in inner if isinstance(child, (ast.For, ast.AugAssign))]
            wrong += [f"For > {type(child).__name__}" for child in nested]
    return wrong


def shows(cell):
    """Whether a cell prints, or ends in an expression whose value is not None."""
    tree = parsed(cell.source)
    prints = any(
        isinstance(node, ast.Call) and ast.unparse(node.func) == "print" for node in ast.walk(tree)
    )
    last = tree.body[-1]
    return prints or isinstance(last, ast.Expr) and ast.unparse(last).startswith(("fig", "Image"))


def test_every_notebook_is_checked():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(SMOKE)


@each
def test_it_begins_with_badge_install_and_parameters(name):
    first, *cells = read(name).cells
    link = f"https://colab.research.google.com/github/{REPOSITORY}/blob/main/notebooks/{name}.ipynb"
    badge = "https://colab.research.google.com/assets/colab-badge.svg"
    assert first.source.startswith(f"[![Open in Colab]({badge})]({link})\n\n# ")
    install, parameters = cells[:2]
    assert 'if importlib.util.find_spec("bn_research") is None:\n    %pip install' in install.source
    assert f"git+https://github.com/{REPOSITORY}" in install.source
    assert tags_of(parameters) == ["parameters"]
    assert names_set(parameters.source) == names_set(SMOKE[name])


@each
def test_it_was_committed_as_it_ran(name):
    path = FOLDER / f"{name}.ipynb"
    notebook = read(name)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert bool(cell.outputs) == shows(cell), cell.source
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output.text
    assert path.stat().st_size < LARGEST
    assert notebook.metadata.kernelspec.name == "python3"
    assert not re.search(r"/(tmp|home|root|work)/|Warning", path.read_text())


@each
def test_every_figure_is_drawn_and_said_in_words(name):
    cells = read(name).cells
    figures = [
        number
        for number, cell in enumerate(cells)
        if any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))
    ]
    captions = [cells[number + 1] for number in figures]
    for number, caption in enumerate(captions, start=1):
        assert re.match(rf"\*Figure {number}[:.] ", caption.source), caption.source
        assert len(caption.source) > 150
    assert len(figures) >= 1
    asked = [cell for cell in code_cells(read(name)) if "new_figure(" in cell.source]
    drawn = [cells[number] for number in figures]
    assert [cell.source for cell in asked] == [
        cell.source for cell in drawn if "Image(" not in cell.source
    ]


@each
def test_it_only_calls_the_library_and_draws(name):
    for cell in code_cells(read(name)):
        yours = "your-network" in tags_of(cell)
        assert not yours or name in YOURS
        if not yours and not is_install(cell):
            assert logic_in(cell.source) == [], cell.source


@pytest.mark.parametrize(
    "source",
    [
        "def f():\n    return 1",
        "class A:\n    pass",
        "while True:\n    pass",
        "if x:\n    y = 1",
        "for a in b:\n    for c in a:\n        axis.plot(c)",
        "for a in b:\n    total += a",
        "with x:\n    def f(): pass",
    ],
)
def test_logic_is_found(source):
    assert logic_in(source)


def test_drawing_is_no_logic():
    assert not logic_in("%matplotlib inline\nfor a, b in zip(c, d):\n    axis.plot(a, b)\nfig")


@each
def test_it_runs_from_top_to_bottom(name, tmp_path, monkeypatch):
    notebook = read(name)
    for cell in code_cells(notebook):
        if "parameters" in tags_of(cell):
            cell.source = SMOKE[name]
    # The kernel has the environment of the tests, see conftest.py; pmap wants several devices.
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
    nbclient.NotebookClient(
        notebook,
        timeout=120,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()  # raises CellExecutionError
    printed = "".join(
        output.text
        for cell in code_cells(notebook)
        for output in cell.outputs
        if output.output_type == "stream"
    )
    assert "Traceback" not in printed
    for cell in code_cells(notebook):
        assert bool(cell.outputs) == shows(cell), cell.source
