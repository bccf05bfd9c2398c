"""`cpu_process`, in processes of their own: it is for before JAX starts."""

import os
import subprocess
import sys

CONVOLUTION = """
import jax, jax.numpy as jnp
x, kernel = jnp.ones((8, 16, 16, 32)), jnp.ones((3, 3, 32, 32))
convolve = lambda x, kernel: jax.lax.conv_general_dilated(
    x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
print("library:", "ynn" in jax.jit(convolve).lower(x, kernel).compile().as_text())
"""
SETTINGS = "from bn_research.training.cpu_process import use_eigen_convolutions\n"


def run(program, flags=""):
    environment = {**os.environ, "XLA_FLAGS": flags}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True
    )
    return done.stdout.strip()


def test_convolutions_are_not_those_of_ynnpack():
    assert run(CONVOLUTION) == "library: True", "XLA's default has changed: is this still of use?"
    assert run(SETTINGS + "use_eigen_convolutions()" + CONVOLUTION) == "library: False"


def test_flags_of_the_user_stay():
    program = SETTINGS + "use_eigen_convolutions()\nimport os\nprint(os.environ['XLA_FLAGS'])"
    own = "--xla_cpu_experimental_ynn_fusion_type=+reduce"
    assert run(program, own) == own
    other = "--xla_force_host_platform_device_count=2"
    assert run(program, other).startswith(f"{other} --xla_cpu")
