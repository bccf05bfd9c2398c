"""The API pages: they build without a warning, and nothing public is missing."""

import ast
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sphinx")
pytest.importorskip("furo")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder of what Sphinx has read, from a copy, in which nothing stands from before."""
    folder = tmp_path_factory.mktemp("api")
    ignored = shutil.ignore_patterns("_build", "modules", "__pycache__")
    shutil.copytree(ROOT / "docs" / "api", folder / "source", ignore=ignored)
    options = ["-q", "-W", "--keep-going", "-b", "dummy", "-d", folder / "doctrees"]
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *options, folder / "source", folder / "out"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return folder / "doctrees"


def unpickled(path):
    with path.open("rb") as file:
        return pickle.load(file)


def text(built, module):
    return unpickled(built / "modules" / f"{module}.doctree").astext()


def public_names():
    """Every module but the root, and what it defines with a docstring."""
    for path in sorted((ROOT / "bn_research").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if module == "bn_research":
            continue
        yield module
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            is_definition = isinstance(node, (ast.FunctionDef, ast.ClassDef))
            if is_definition and not node.name.startswith("_") and ast.get_docstring(node):
                yield f"{module}.{node.name}"


def test_every_public_module_class_and_function_has_an_entry(built):
    names = set(public_names())
    assert {"bn_research.layers.linen.BatchNorm", "bn_research.data.idx"} <= names
    entries = unpickled(built / "environment.pickle").domaindata["py"]
    assert names - set(entries["objects"]) - set(entries["modules"]) == set()


def test_signatures_have_the_shapes_as_the_source_writes_them(built):
    page = text(built, "bn_research.normalization.batch_norm")
    assert "scale: Float[Array, '*features'] | None = None" in page
    assert "dtype: DTypeLike | None = None" in page
    page = text(built, "bn_research.layers.linen")
    assert "scale_init: Initializer | Callable[[...], Any] = ones" in page
    assert "parent:" not in page and "An initializer that returns" not in page
    page = text(built, "bn_research.models.resnet")
    assert "activation: Callable[[Array], Array] = ...," in page and "custom_jvp" not in page


def test_docstrings_read_as_they_are_written(built):
    moments = text(built, "bn_research.normalization.moments")
    assert "sum of squared deviations from the mean" in moments and "Alias for" not in moments
    renorm = text(built, "bn_research.normalization.renorm")
    assert "|μ_B − μ|" in renorm
    convert = unpickled(built / "modules" / "bn_research.layers.convert.doctree")
    listings = [node.astext() for node in convert.findall(lambda n: n.tagname == "literal_block")]
    assert any("weight, bias" in listing for listing in listings)
