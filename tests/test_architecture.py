"""The floors of the house: what a file may import, read from the source by `ast`."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A file imports only from floors below its own, or from its own folder.
FLOORS = {
    "bn_research.normalization": 1,
    "bn_research.data": 1,
    "bn_research.claims": 1,
    "bn_research.layers": 2,
    "bn_research.probes": 2,
    "bn_research.training": 2,
    "bn_research.models": 3,
    "bn_research.lab": 4,
    "experiments": 5,
}
# Libraries that a folder does without.
BANNED = {
    "bn_research": {"experiments"},
    "bn_research.claims": {"jax", "jaxlib", "flax", "optax", "orbax"},
    "bn_research.normalization": {"flax", "optax", "orbax"},
    "bn_research.data": {"flax", "optax", "orbax"},
    "bn_research.probes": {"flax"},
}
ABSL_BELONGS_TO = "bn_research.lab"
BANNED_NAMES = {"utils.py", "util.py", "common.py", "helpers.py", "misc.py"}


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def module_name(path: Path) -> str:
    """Dotted name of a file relative to the root; a package's is that of its folder."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, source: str) -> set[str]:
    """Dotted names that a file imports, wherever in it; `from a import b` gives a.b."""
    package = path.parent.parts
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *(node.module or "").split("."))).strip(".")
            names |= {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func)
            if called in ("__import__", "importlib.import_module", "import_module"):
                if isinstance(node.args[0], ast.Constant):
                    names.add(str(node.args[0].value))
    return names


def folder_of(module: str) -> str | None:
    return next((folder for folder in FLOORS if within(module, folder)), None)


def room_of(module: str) -> str | None:
    """The room of a file of experiments/; None of the doors that stand beside the rooms."""
    names = module.split(".")
    return names[1] if len(names) > 1 and (ROOT / "experiments" / names[1]).is_dir() else None


def violations(path: Path, source: str) -> list[str]:
    """What is wrong with a file, path relative to the root; empty when nothing is."""
    module, wrong = module_name(path), []
    folder = folder_of(module)
    if path.name in BANNED_NAMES:
        wrong.append(f"{path}: name a file after what it holds")
    if folder is None and module != "bn_research":
        wrong.append(f"{path}: lies on no floor of the design")
    for name in sorted(imports_of(path, source)):
        for package, banned in BANNED.items():
            if within(module, package) and any(within(name, ban) for ban in banned):
                wrong.append(f"{path}: imports {name}, which {package} does without")
        if within(name, "absl.flags") and not within(module, ABSL_BELONGS_TO):
            wrong.append(f"{path}: imports {name}, which belongs to {ABSL_BELONGS_TO}")
        target = folder_of(name)
        if target is None:
            continue
        if target != folder and FLOORS[target] >= FLOORS.get(folder, 0):
            wrong.append(f"{path}: imports {name}, which is not on a floor below")
        if folder == target == "experiments" and room_of(name) not in (None, room_of(module)):
            wrong.append(f"{path}: imports {name}, another experiment's room")
    return wrong


def circle(sources: dict[Path, str]) -> list[str]:
    """Modules of which each imports the next and the last is the first; empty without any.

    What only a function or a type checker imports counts too. An import of a file in another
    package runs that package's __init__.
    """
    files = {module_name(path): path for path in sources}
    graph = {}
    for module, path in files.items():
        graph[module] = set()
        for name in imports_of(path, sources[path]):
            parts = name.split(".")
            prefixes = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
            found = [prefix for prefix in prefixes if prefix in files]
            graph[module] |= {package for package in found if not within(module, package)}
            graph[module] |= set(found[-1:])
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1][::-1]
    return []


def sources() -> list[Path]:
    return sorted(
        path.relative_to(ROOT)
        for folder in ("bn_research", "experiments")
        for path in (ROOT / folder).rglob("*.py")
    )


def test_there_are_files_to_check():
    names = {module_name(path) for path in sources()}
    assert {"bn_research", "bn_research.normalization.moments", "bn_research.models.cnn"} <= names


@pytest.mark.parametrize("path", sources(), ids=str)
def test_a_file_keeps_to_its_floor(path):
    assert violations(path, (ROOT / path).read_text(encoding="utf-8")) == []


NORMALIZATION, LAYER = "bn_research/normalization/x.py", "bn_research/layers/x.py"
TRAINING, MODEL = "bn_research/training/x.py", "bn_research/models/x.py"
CLAIMS, DATA = "bn_research/claims/x.py", "bn_research/data/x.py"
LAB, ROOM = "bn_research/lab/x.py", "experiments/transform/x.py"


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (NORMALIZATION, "import bn_research.layers.linen"),
        (NORMALIZATION, "from bn_research.data import datasets"),
        (NORMALIZATION, "from bn_research import claims"),
        (NORMALIZATION, "from ..data import idx"),
        (NORMALIZATION, "import flax.linen as nn"),
        (NORMALIZATION, "def f():\n    from bn_research.models import cnn"),
        (DATA, "from bn_research.normalization.moments import Moments"),
        (DATA, "import bn_research.claims.atomic"),
        (CLAIMS, "import jax"),
        (CLAIMS, "from jax import numpy as jnp"),
        (CLAIMS, "import flax"),
        (CLAIMS, "from bn_research.data import errors"),
        (LAYER, "from bn_research.models.cnn import CNN"),
        (LAYER, "from bn_research.training import step"),
        (TRAINING, "from bn_research.layers.linen import BatchNorm"),
        (TRAINING, "from bn_research.models import spec"),
        (TRAINING, "import importlib\nimportlib.import_module('bn_research.models')"),
        (MODEL, "import bn_research.lab.launch"),
        (MODEL, "from absl import flags"),
        (MODEL, "import absl.flags"),
        ("bn_research/__init__.py", "from bn_research.layers import linen"),
        ("bn_research/__init__.py", "from . import normalization"),
        (LAB, "from experiments.transform import verdicts"),
        (LAB, "import experiments"),
        (ROOM, "from absl import flags"),
        (ROOM, "from experiments.imagenet import PRESETS"),
        (ROOM, "from experiments import imagenet"),
        (ROOM, "from .. import imagenet"),
        (ROOM, "from experiments.imagenet.verdicts import judge"),
        ("bn_research/utils.py", ""),
        ("bn_research/data/common.py", ""),
        ("bn_research/extras/x.py", ""),
    ],
)
def test_a_bad_import_is_found(path, source):
    assert violations(Path(path), source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (NORMALIZATION, "import jax\nfrom bn_research.normalization.moments import Moments"),
        (NORMALIZATION, "from . import moments"),
        (LAYER, "import flax.linen as nn\nfrom bn_research.normalization import batch_norm"),
        (TRAINING, "import optax\nfrom bn_research.data import Examples"),
        (
            MODEL,
            "from bn_research.layers.conv import Conv\nfrom bn_research.models.spec import Pool",
        ),
        (CLAIMS, "import numpy as np\nfrom bn_research.claims.atomic import write"),
        (DATA, "from absl import logging\nimport bn_research"),
        (LAB, "from absl import flags\nfrom bn_research.models import cnn\nimport jax"),
        (ROOM, "from bn_research.lab.workdir import Ledger\nfrom bn_research.models import cnn"),
        (ROOM, "from experiments.transform import Config\nfrom experiments.transform import draw"),
        (ROOM, "from . import verdicts"),
        ("experiments/reproduce.py", "from bn_research.lab.reproduce import main"),
        ("bn_research/__init__.py", '__version__ = "1"'),
    ],
)
def test_a_good_import_is_let_through(path, source):
    assert violations(Path(path), source) == []


def test_no_file_imports_itself_through_others():
    texts = {path: (ROOT / path).read_text(encoding="utf-8") for path in sources()}
    assert circle(texts) == []


@pytest.mark.parametrize(
    ("back", "found"),
    [
        ("from p.q import a", True),
        ("import p.q.a", True),
        ("from . import a", True),
        ("def f():\n    from p.q.a import X", True),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.q.a import X", True),
        ("from p.q import X", True),  # of p/q/__init__.py, which imports a
        ("from p.c import X", True),  # another package's file, which imports a
        ("from p.q.types import X", False),
        ("from p.q import types", False),
        ("from p.d.e import X", True),  # runs p/d/__init__.py, which imports a
        ("import p", False),
    ],
)
def test_a_circle_of_imports_is_found(back, found):
    texts = {
        "p/__init__.py": "",
        "p/q/__init__.py": "from p.q.a import X",
        "p/q/a.py": "from p.q.b import Y",
        "p/q/b.py": back,
        "p/q/types.py": "import typing",
        "p/c.py": "from p.q.a import X",
        "p/d/__init__.py": "from p.q import a",
        "p/d/e.py": "",
    }
    modules = circle({Path(path): text for path, text in texts.items()})
    assert bool(modules) == found
    assert not found or (modules[0] == modules[-1] and "p.q.b" in modules)


# They take seconds to import; only a run needs them.
SLOW = "jax flax optax matplotlib scipy sklearn orbax tensorflow_datasets grain".split()


def test_asking_an_experiment_for_help_loads_no_slow_library():
    names = [path.parent.name for path in (ROOT / "experiments").glob("*/__init__.py")]
    assert "init_sensitivity" in names
    program = "import sys\nfrom bn_research.lab import main\n"
    for name in names:
        program += (
            f"import experiments.{name} as room\nassert main(room.EXPERIMENT, ['', '-h']) == 0\n"
        )
    program += f"print([name for name in {SLOW} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert done.stdout.count("--config.FIELD, with this preset's values:") == len(names)
