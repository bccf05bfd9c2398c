"""Eight CPU devices for every test, and programs compiled in a hurry: tests run them once."""

import importlib.metadata
import os

_FLAGS = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # XLA's older code generator compiles in half the time; XLA of jax 0.11 has it no more.
    _FLAGS += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_opt_preset=FAST_COMPILE"]
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS])
# Tests neither read nor fill the user's cache; the tests of the cache have their own.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture
def strict_arrays():
    """JAX casts no dtype and adds no axis by itself, as some users have it everywhere."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(scope="module", autouse=True)
def _forget_compiled_programs():
    """A process that keeps every program comes to Linux's limit of mappings, 65,530, and dies."""
    yield
    jax.clear_caches()
