"""Compiled programs kept on disk, so that the next process need not compile them again."""

import contextlib
import hashlib
import platform
import time
from pathlib import Path

import jax
import platformdirs

_SHORTEST = 0.1  # seconds of compilation that are worth a file
_UNUSED = 30 * 24 * 3600.0  # seconds


def use_compilation_cache() -> None:
    """Has JAX keep what it compiles in the user's cache folder, and look there first.

    Does nothing where JAX has been told already: JAX_COMPILATION_CACHE_DIR names another folder,
    JAX_ENABLE_COMPILATION_CACHE=false keeps nothing. Programs unused for a month are removed. A
    program is found again by what it computes, JAX's version, XLA's options and the device; CPUs of
    different instructions, which may share a home, have folders of their own.
    """
    told = jax.config.values
    if told["jax_compilation_cache_dir"] or not told["jax_enable_compilation_cache"]:
        return
    cache = Path(platformdirs.user_cache_dir("bn_research", appauthor=False))
    folder = cache / "compiled" / _instructions()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:  # a home without room or right to write: every process compiles for itself
        return
    _remove_unused(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _SHORTEST)


def _instructions() -> str:
    """Names what this CPU can do."""
    named = platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        named += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(named.encode()).hexdigest()[:12]


def _remove_unused(folder: Path) -> None:
    oldest = time.time() - _UNUSED
    for path in folder.iterdir():
        with contextlib.suppress(OSError):  # another process was first
            if path.stat().st_atime < oldest:
                path.unlink()
