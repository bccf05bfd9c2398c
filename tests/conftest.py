"""Eight CPU devices for every test, and programs compiled in a hurry: tests run them once."""

import os

os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    ]
)

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
