"""`use_compilation_cache`, in processes of their own: its settings are those of the process."""

import os
import subprocess
import sys
import time

COUNT = """
import jax
counts = {}
def count(event, **_):
    counts[event.rpartition("/")[2]] = counts.get(event.rpartition("/")[2], 0) + 1
jax.monitoring.register_event_listener(count)
"""
PROGRAM = """
from bn_research.training import compilation_cache
compilation_cache._SHORTEST = 0.0
compilation_cache.use_compilation_cache()
import jax.numpy as jnp
print(float(jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x))(jnp.ones(5))))
print(counts.get("cache_misses", 0), counts.get("cache_hits", 0))
print(jax.config.jax_compilation_cache_dir)
"""
EXPERIMENT = """
import logging, re, sys
hits, compiler = [], logging.getLogger("jax._src.compiler")
class Hits(logging.Handler):
    def emit(self, record):
        hits.extend(re.findall("cache hit for '([^']*)'", record.getMessage()))
compiler.addHandler(Hits())
compiler.setLevel(logging.DEBUG)
compiler.propagate = False
from bn_research.training import compilation_cache
compilation_cache._SHORTEST = 0.0
from bn_research.lab import launch
from experiments import learning_rate
status = launch.main(learning_rate.EXPERIMENT, ["learning_rate", "--preset=smoke", sys.argv[1]])
print("status", status)
print(*hits)
print(counts.get("cache_misses", 0), counts.get("cache_hits", 0))
"""


def run(program, cache, *arguments, **environment):
    settings = {"XDG_CACHE_HOME": str(cache), "JAX_ENABLE_COMPILATION_CACHE": "true"}
    environment = {**os.environ, **settings, **environment}
    done = subprocess.run(
        [sys.executable, "-c", COUNT + program, *arguments],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr


def counts(lines):
    return tuple(int(number) for number in lines.split())


def test_the_next_process_finds_what_was_compiled(tmp_path):
    (value, first, folder), _ = run(PROGRAM, tmp_path)
    assert folder.startswith(f"{tmp_path}/bn_research/compiled/")
    misses, hits = counts(first)
    assert misses > 0 and hits == 0
    (again, second, _), said = run(PROGRAM, tmp_path)
    assert counts(second) == (0, misses) and again == value
    assert not said  # XLA's loader has no complaint


def test_what_jax_has_been_told_stays(tmp_path):
    (_, _, folder), _ = run(PROGRAM, tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own"))
    assert folder == str(tmp_path / "own")
    (_, found, folder), _ = run(PROGRAM, tmp_path, JAX_ENABLE_COMPILATION_CACHE="false")
    assert folder == "None" and not (tmp_path / "bn_research").exists()
    assert counts(found) == (0, 0)


def test_a_home_without_room(tmp_path):
    """The folder cannot be made: programs are compiled as ever."""
    file = tmp_path / "file"
    file.touch()
    (_, found, folder), _ = run(PROGRAM, file)
    assert folder == "None" and counts(found) == (0, 0)


def test_programs_unused_for_a_month_go(tmp_path):
    (_, _, folder), _ = run(PROGRAM, tmp_path)
    kept, removed = (os.path.join(folder, name) for name in ("kept", "removed"))
    for path, days in ((kept, 29), (removed, 31)):
        with open(path, "w"):
            pass
        os.utime(path, (time.time() - days * 86400,) * 2)
    run(PROGRAM, tmp_path)
    assert os.path.exists(kept) and not os.path.exists(removed)


def test_an_experiment_compiles_each_program_once(tmp_path):
    """A run asks an empty cache for no training program twice; the next run compiles nothing."""
    lines, _ = run(EXPERIMENT, tmp_path / "cache", f"--workdir={tmp_path / 'first'}")
    assert lines[-3] == "status 0"
    assert set(lines[-2].split()) <= {"jit_create"}  # the initial state, for each sweep
    misses, hits = counts(lines[-1])
    lines, _ = run(EXPERIMENT, tmp_path / "cache", f"--workdir={tmp_path / 'second'}")
    assert misses > 0 and counts(lines[-1]) == (0, misses + hits)
    assert "jit_create" in lines[-2].split()  # names are heard
