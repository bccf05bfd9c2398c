"""Eight CPU devices for every test, and programs compiled in a hurry: tests run them once."""

import importlib.metadata
import os
import re

_FLAGS = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # XLA's older code generator compiles in half the time; XLA of jax 0.11 has it no more.
    _FLAGS += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_opt_preset=FAST_COMPILE"]
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS])
# Tests neither read nor fill the user's cache; the tests of the cache have their own.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
# Programs need not know pytest's stack.
os.environ["JAX_INCLUDE_FULL_TRACEBACKS_IN_LOCATIONS"] = "false"

import jax  # noqa: E402
import pytest  # noqa: E402
import smoke  # noqa: E402

from bn_research.lab.rooms import experiment_names  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
_EXPERIMENTS = experiment_names()


@pytest.fixture
def strict_arrays():
    """JAX casts no dtype and adds no axis by itself, as some users have it everywhere."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(scope="session")
def smoke_run_of(tmp_path_factory):
    """Gives a finished smoke run of an experiment, with what it did; run once a session."""
    runs = {}

    def run_of(name):
        if name not in runs:
            run = smoke.run_smoke(name, tmp_path_factory.mktemp("smoke") / name)
            runs[name] = run, smoke.files(run.path)
        return runs[name][0]

    yield run_of
    changed = [name for name, (run, files) in runs.items() if smoke.files(run.path) != files]
    assert not changed, f"a test has changed the shared runs of {changed}: copy them first"


@pytest.fixture(scope="session")
def smoke_run(smoke_run_of):
    """Gives the workdir of a finished smoke run; copy it before changing anything in it."""
    return lambda name: smoke_run_of(name).path


# --- the order of the tests, and who runs them ---


def _group(nodeid):
    """The experiment that a test is of, else its file: what shares a process and a smoke run."""
    path, _, test = nodeid.partition("::")
    if path.endswith("test_experiments.py"):
        return re.search(r"\[(\w+)", test)[1]
    of = [name for name in _EXPERIMENTS if f"experiments/test_{name}" in path]
    return max(of, key=len, default=path)


def pytest_collection_modifyitems(items):
    """The tests of a group together, and the experiments first: they take longest."""
    groups = dict.fromkeys([*_EXPERIMENTS, *(_group(item.nodeid) for item in items)])
    places = {group: place for place, group in enumerate(groups)}
    items.sort(key=lambda item: places[_group(item.nodeid)])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Gives each process of `-n` one group after the other."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return _group(nodeid)

    config.option.loadscopereorder = False
    return Scheduling(config, log)


def pytest_runtest_teardown(item, nextitem):
    """A process that keeps every program comes to Linux's limit of mappings, 65,530, and dies."""
    if nextitem is None or _group(nextitem.nodeid) != _group(item.nodeid):
        jax.clear_caches()
