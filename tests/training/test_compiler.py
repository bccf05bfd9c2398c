"""`compiler_options`: the level of a program, unless the environment has chosen."""

from bn_research.training.compiler import compiler_options


def test_the_environment_has_the_last_word(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")
    assert compiler_options(2) == {"xla_backend_optimization_level": 2}
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    assert compiler_options(2) == {}
