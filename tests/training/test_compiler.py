"""`compiler_options`: the level of a program, unless the environment has chosen."""

import jax
import pytest

from bn_research.training.compiler import compiler_options


@pytest.mark.parametrize(
    ("backend", "flags", "expected"),
    [
        ("cpu", "--xla_cpu_use_fusion_emitters=false", {"xla_backend_optimization_level": 2}),
        ("cpu", "--xla_backend_optimization_level=0", {}),
        ("gpu", "", {}),
    ],
)
def test_the_environment_has_the_last_word(monkeypatch, backend, flags, expected):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setenv("XLA_FLAGS", flags)
    assert compiler_options(2) == expected
