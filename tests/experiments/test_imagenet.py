"""The ImageNet job: its networks at full size, real steps at a small one, and how it survives."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from imagenet_like import make_imagenet_like

from bn_research.claims.finding import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED
from bn_research.lab.launch import main
from bn_research.training.checkpoint import Checkpointer
from bn_research.training.parallel import create_parallel
from bn_research.training.state import create_train_state
from bn_research.training.step import Batch, make_train_step
from experiments.imagenet import EXPERIMENT, PRESETS, Config
from experiments.imagenet.programs import SETTINGS, Programs, create_model, make_apply_fn
from experiments.imagenet.training import prepare
from experiments.imagenet.verdicts import PUBLISHED, is_published_setting, judge, steps_to_target

ROOT = Path(__file__).parents[2]
SMOKE = PRESETS["smoke"]


def launch(workdir, *flags):
    return main(EXPERIMENT, ["imagenet", "--preset=smoke", f"--workdir={workdir}", *flags])


def configured(**fields):
    return [f"--config.{name}={value}" for name, value in fields.items()]


def measured(workdir):
    """Records of a run by name."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return {record["name"]: record for record in map(json.loads, lines)}


def count(tree):
    """Of numbers in its arrays."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


CHANNELS = np.sum(  # of all convolutions: the claims' table, row by row
    [
        *(64, 64, 192),
        *(64, 64, 64, 64, 96, 96, 32),
        *(64, 64, 96, 64, 96, 96, 64),
        *(128, 160, 64, 96, 96),
        *(224, 64, 96, 96, 128, 128, 128),
        *(192, 96, 128, 96, 128, 128, 128),
        *(160, 128, 160, 128, 160, 160, 128),
        *(96, 128, 192, 160, 192, 192, 128),
        *(128, 192, 192, 256, 256),
        *(352, 192, 320, 160, 224, 224, 128),
        *(352, 192, 320, 192, 224, 224, 128),
    ]
)


@pytest.mark.parametrize("setting", SETTINGS)
def test_networks_at_full_size(setting):
    """BN: 11,285,224 parameters; without it a convolution's bias for each scale and bias of BN."""
    config = dataclasses.replace(Config(), setting=setting)
    model = create_model(config, 1000, axis_name=None)
    images = jnp.zeros((2, 224, 224, 3))
    shapes = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images)
    if setting == "inception":
        assert "batch_stats" not in shapes
        assert count(shapes["params"]) == 11_285_224 - CHANNELS
    else:
        assert count(shapes["params"]) == 11_285_224
        stats = shapes["batch_stats"]
        assert len(jax.tree.leaves(stats)) == 2 * 69 and count(stats) == 2 * CHANNELS


def traced_step(devices, group_size):
    """The step of the paper's job at full size, 32 images on each device: jaxpr and shapes."""
    parallel = create_parallel("shard_map", jax.devices()[:devices])
    config = dataclasses.replace(Config(), group_size=group_size)
    model = create_model(config, 1000, axis_name=parallel.axis_name)
    optimizer = optax.sgd(0.1, momentum=0.9)
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    state = jax.eval_shape(
        lambda image: create_train_state(
            lambda key: model.init(key, image, train=False), optimizer, jax.random.key(0)
        ),
        image,
    )
    shapes = ((32 * devices, 224, 224, 3), jnp.uint8), ((32 * devices,), jnp.int32)
    batch = Batch(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))
    step = make_train_step(make_apply_fn(model, 255), optimizer, axis_name=parallel.axis_name)
    jaxpr, shapes = jax.make_jaxpr(parallel.map(step), return_shape=True)(state, batch)
    return state, jaxpr, shapes


def shapes_of(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def test_a_step_at_full_size():
    """224 × 224 on eight devices: the state keeps its shapes, and BN names two sums a layer."""
    sums = {}
    for group_size in (0, 32):
        state, jaxpr, (new, metrics) = traced_step(8, group_size)
        assert shapes_of(new) == shapes_of(state) and metrics.loss.shape == ()
        sums[group_size] = len(re.findall(r"= psum\w*\[", str(jaxpr)))
    assert sums[0] - sums[32] == 2 * 69
    # Groups within a device: an array each of gradients, statistics and metrics; XLA joins them.
    assert sums[32] == len(jax.tree.leaves((new.params, new.batch_stats))) + 3


def test_the_five_settings():
    """The paper's table: rates 1, 1, 5, 30 and 5 times the baseline's; what BN-x5 changes."""
    rates = {name: setting.learning_rate for name, setting in SETTINGS.items()}
    assert rates["inception"] == rates["bn_baseline"] == 0.0015
    assert rates["bn_x5"] == rates["bn_x5_sigmoid"] == pytest.approx(5 * 0.0015)
    assert rates["bn_x30"] == pytest.approx(30 * 0.0015)
    base, fast = SETTINGS["bn_baseline"], SETTINGS["bn_x5"]
    assert [name for name, s in SETTINGS.items() if not s.batch_norm] == ["inception"]
    assert base.dropout == 0.4 and fast.dropout == 0
    assert base.local_response_norm and not fast.local_response_norm
    assert base.weight_decay == pytest.approx(5 * fast.weight_decay)
    assert base.epochs_per_decay == pytest.approx(6 * fast.epochs_per_decay)
    assert fast.distortion < base.distortion
    assert SETTINGS["bn_x5_sigmoid"].activation is jax.nn.sigmoid
    assert list(PUBLISHED) == list(SETTINGS)


def test_the_rate_decays_and_l2_reaches_the_weights():
    """One step of the job's optimizer, by hand."""
    builder = prepare(SMOKE)
    programs = Programs(SMOKE, builder, create_parallel("jit", jax.devices()[:1]))
    params = {"conv": {"kernel": jnp.ones(2)}, "norm": {"scale": jnp.ones(2)}}
    grads = jax.tree.map(jnp.zeros_like, params)
    state = programs.optimizer.init(params)
    steps_per_decay = round(8 / 6 * 898 / 32)
    for step in range(steps_per_decay + 1):
        updates, state = programs.optimizer.update(grads, state, params)
        if step == 0:
            np.testing.assert_allclose(updates["conv"]["kernel"], -0.0075 * 8e-6, rtol=1e-5)
            np.testing.assert_array_equal(updates["norm"]["scale"], 0)
    # Momentum at its limit of 10 times the gradient, the rate at 0.96 of what it was.
    momentum = sum(0.9**k for k in range(steps_per_decay + 1))
    expected = -0.0075 * 0.96 * 8e-6 * momentum
    np.testing.assert_allclose(updates["conv"]["kernel"], expected, rtol=1e-4)


def records(*accuracies):
    return [{"step": 1000 * (i + 1), "accuracy": a} for i, a in enumerate(accuracies)]


def test_steps_to_target():
    assert steps_to_target(records(0.1, 0.7219, 0.722, 0.6)) == 3000
    assert steps_to_target(records(0.5)) == steps_to_target([]) == math.inf


RUN = {"loss": [6.9, 1.0], "diverged": 0}


@pytest.mark.parametrize(
    ("setting", "steps", "curve", "verdict"),
    [
        ("bn_x5", 4_000_000, [(2_000_000, 0.723), (4_000_000, 0.731)], REPRODUCED),
        ("bn_x5", 4_000_000, [(2_000_000, 0.700), (3_500_000, 0.731)], NOT_REPRODUCED),  # late
        ("bn_x5", 4_000_000, [(4_000_000, 0.715)], NOT_REPRODUCED),  # low
        ("bn_x5", 1_000_000, [(1_000_000, 0.715)], INCONCLUSIVE),  # cut
        ("bn_x5_sigmoid", 6_000_000, [(6_000_000, 0.69)], REPRODUCED),
        ("bn_x5_sigmoid", 6_000_000, [(6_000_000, 0.50)], NOT_REPRODUCED),
    ],
)
def test_verdicts_at_the_published_setting(setting, steps, curve, verdict):
    """Only the trained setting is decided; the rest stays published."""
    config = dataclasses.replace(Config(), setting=setting, num_steps=steps)
    assert is_published_setting(config)
    curve = [{"step": step, "accuracy": accuracy} for step, accuracy in curve]
    for finding in judge(config, [{"curve": curve, **RUN}]):
        own = finding.claim.id == f"imagenet-{setting.replace('_', '-')}"
        assert finding.verdict == (verdict if own else INCONCLUSIVE)
        assert own or "published" in finding.note and not finding.measured


OTHERS = dict(
    dataset="cifar10", width=0.5, batch_size=256, group_size=8, dtype="bfloat16", image_size=192
)


@pytest.mark.parametrize("name", OTHERS)
def test_another_setting_decides_nothing(name):
    config = dataclasses.replace(Config(), **{name: OTHERS[name]})
    findings = judge(config, [{"curve": records(0.9), **RUN}])
    assert {finding.verdict for finding in findings} == {INCONCLUSIVE}
    assert any("not the published setting" in finding.note for finding in findings)


@pytest.fixture(scope="module")
def finished(smoke_run):
    """A smoke run on eight devices, pmapped."""
    assert jax.device_count() == 8
    return smoke_run("imagenet")


def test_smoke(finished):
    found = measured(finished)
    assert set(found) == {*(f"evaluation/seed=0 step={n}" for n in (10, 20)), "run/seed=0"}
    assert found["evaluation/seed=0 step=20"]["count"] == 899
    assert found["run/seed=0"]["loss"][-1] < found["run/seed=0"]["loss"][0]
    results = json.loads((finished / "results.json").read_text())
    assert [claim["verdict"] for claim in results["claims"]] == [INCONCLUSIVE] * 6
    assert "published: 74.8 %" in (finished / "report.html").read_text()


def close(a, b, tolerance=1e-5):
    """The same records, to rounding: losses and accuracies."""
    assert set(a) == set(b)
    for name in a:
        np.testing.assert_allclose(a[name]["loss"], b[name]["loss"], rtol=tolerance)


@pytest.mark.parametrize("mode", ["jit", "shard_map"])
def test_the_mode_changes_nothing(tmp_path, finished, mode):
    """And the last state is kept, though no checkpoint was due by then."""
    assert launch(tmp_path / mode, f"--parallel={mode}", "--config.checkpoint_every=15") == 0
    close(measured(tmp_path / mode), measured(finished))
    with contextlib.closing(Checkpointer(tmp_path / mode / "checkpoints")) as saver:
        assert saver.newest()[1]["steps"] == 20


def test_a_stream_opened_at_a_step():
    """With microbatches too: the batches from there on, as a stream from the start gives them."""
    pieces = dict(microbatches=2, microbatch_statistics="microbatch")
    config = dataclasses.replace(SMOKE, batch_size=16, **pieces)
    programs = Programs(config, prepare(config), create_parallel("jit"))
    with programs.stream(0) as open_stream:
        start, later = open_stream(0), open_stream(3)
        for _ in range(3):
            next(start)
        for _ in range(2):
            jax.tree.map(np.testing.assert_array_equal, next(start), next(later))


def test_microbatches(tmp_path):
    """Two of 16 by their own statistics train as one of 32 in groups of 16: the same examples."""
    pieces = dict(microbatches=2, microbatch_statistics="microbatch")
    for name, how in (("groups", dict(group_size=16)), ("pieces", pieces)):
        flags = configured(num_steps=10, batch_size=32, **how)
        assert launch(tmp_path / name, *flags) == 0
    close(measured(tmp_path / "pieces"), measured(tmp_path / "groups"))


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("batch_size=12", "batch_size=12 does not divide over 8 devices"),
        ("num_steps=7", "num_steps=7 is not allowed"),
        ("checkpoint_every=3", "checkpoint_every=3 is not allowed"),
        ("microbatches=3", "microbatches=3 does not divide batch_size=32"),
        ("microbatches=2", "say 'microbatch' or 'batch'"),
        ("microbatch_statistics=batch", "nothing with one"),
        ("image_size=24", "image_size=24 is not allowed with augmentation='none'"),
        ("network=c8", "does not end in a dense layer"),
        ("network=c8 f7", "digits has 10 classes"),
        ("group_size=5", "group_size=5 does not divide the 32 examples"),
        ("dataset=imagenet2012", "imagenet2012 is not in"),
    ],
)
def test_bad_input(tmp_path, capsys, flag, said):
    assert launch(tmp_path / "run", f"--config.{flag}", f"--config.data_dir={tmp_path}") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("imagenet: ") and said in error


LONG = configured(num_steps=200, evaluate_every=100, checkpoint_every=10, network="c8 f10")
_PATIENCE = 120
BAR = re.compile(r"\r?(bn_x5, seed 0: )? *\d+%\|[^|]*\| \d+/\d+ \[[^\]]*\]")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Where processes keep what they have compiled: they all compile the same."""
    return tmp_path_factory.mktemp("compiled")


def command(workdir, *flags):
    module = [sys.executable, "-m", "experiments.imagenet"]
    return [*module, "--preset=smoke", f"--workdir={workdir}", *LONG, *flags]


def begin(words, cache, devices=1):
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    pipe = subprocess.PIPE
    return subprocess.Popen(words, env=environment, stdout=pipe, stderr=pipe, text=True)


def begin_two(workdir, cache):
    """Two processes of two devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = [f"--coordinator_address=127.0.0.1:{port}", "--num_processes=2"]
    jobs = [command(workdir, *flags, f"--process_id={index}") for index in range(2)]
    return [begin(job, cache, devices=2) for job in jobs]


def end(process, status=0):
    """What it said on stderr, less its progress bar."""
    said = process.communicate(timeout=_PATIENCE)[1]
    assert process.returncode == status, said
    return [line for line in BAR.sub("", said).splitlines() if line.strip()]


def newest_checkpoint(workdir):
    """Its number; 0 without any."""
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def wait_for_checkpoint(process, workdir, after=0):
    """Until it has written a checkpoint of a number above `after`."""
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        if (newest := newest_checkpoint(workdir)) > after:
            return newest
        time.sleep(0.02)
    raise AssertionError(process.communicate()[1])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, compiled):
    workdir = tmp_path_factory.mktemp("runs") / "alone"
    assert end(begin(command(workdir), compiled)) == []
    return measured(workdir)


def test_sigterm_saves_and_sigkill_loses_nothing(tmp_path, undisturbed, compiled):
    """Stopped once, killed twice: the digest of the parameters and every record are the same."""
    workdir = tmp_path / "run"
    first = begin(command(workdir), compiled)
    number = wait_for_checkpoint(first, workdir)
    first.send_signal(signal.SIGTERM)
    said = end(first, 4)
    assert len(said) == 1 and "stopped by SIGTERM at step" in said[0] and "start again" in said[0]
    for _ in range(2):
        process = begin(command(workdir), compiled)
        number = wait_for_checkpoint(process, workdir, after=number)
        process.kill()
        process.communicate()
    end(begin(command(workdir), compiled))
    assert measured(workdir) == undisturbed


def test_a_checkpoint_of_another_model(tmp_path, compiled):
    """Its workdir's config says the same, so only the checkpoint can tell."""
    for name, network in (("a", "c8 f10"), ("b", "c4 f10")):
        flags = configured(num_steps=20, evaluate_every=20, network=network)
        end(begin(command(tmp_path / name, *flags), compiled))
    shutil.rmtree(tmp_path / "b" / "checkpoints")
    shutil.copytree(tmp_path / "a" / "checkpoints", tmp_path / "b" / "checkpoints")
    said = end(begin(command(tmp_path / "b", *flags), compiled), 2)
    assert len(said) == 1 and "is of another model" in said[0]


def test_inception_on_an_imagenet_of_our_own(tmp_path, compiled):
    """Real steps of BN-Inception, 1/16 wide, on JPEGs of varying sizes, on two devices.

    With crops, flips and distortions by a worker process, and an evaluation.
    """
    make_imagenet_like(tmp_path / "data", 48, 20)
    config = dict(
        dataset="imagenet2012",
        data_dir=tmp_path / "data",
        network="inception",
        width=1 / 16,
        augmentation="imagenet",
        image_size=32,
        batch_size=16,
        steps_per_dispatch=2,
        num_workers=1,
        **dict.fromkeys(("num_steps", "evaluate_every", "checkpoint_every"), 4),
    )
    process = begin(command(tmp_path / "run", *configured(**config)), compiled, devices=2)
    said = process.communicate(timeout=5 * _PATIENCE)[1]  # most of it compilation
    assert process.returncode == 0, said
    found = measured(tmp_path / "run")
    losses = found["run/seed=0"]["loss"]
    assert len(losses) == 2 and all(4 < loss < 12 for loss in losses)  # ln 1000 = 6.9
    assert found["evaluation/seed=0 step=4"]["count"] == 20


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, compiled):
    workdir = tmp_path_factory.mktemp("runs") / "two"
    for process in begin_two(workdir, compiled):
        assert end(process) == []
    return measured(workdir)


def test_two_processes_equal_one(two_processes, undisturbed):
    """Two processes of two devices and one process of one: losses to rounding, 200 steps long."""
    close(two_processes, undisturbed, 1e-3)
    first = [found["run/seed=0"]["loss"][0] for found in (two_processes, undisturbed)]
    assert first[0] == pytest.approx(first[1], rel=1e-6)


def test_a_killed_process_ends_the_job_which_starts_again(tmp_path, two_processes, compiled):
    """The other ends by itself with status 5 and a line; the next start ends with the same bits."""
    workdir = tmp_path / "run"
    for victim in (0, 1):
        job = begin_two(workdir, compiled)
        wait_for_checkpoint(job[0], workdir, after=newest_checkpoint(workdir))
        job[victim].kill()
        killed = time.monotonic()
        said = end(job[1 - victim], 5)
        assert time.monotonic() - killed < 60
        assert len(said) == 1 and f"process {victim}" in said[0]
        job[victim].communicate()
    for process in begin_two(workdir, compiled):
        end(process)
    assert measured(workdir) == two_processes


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="Open MPI is not installed")
def test_the_same_under_mpirun(tmp_path, two_processes, compiled):
    words = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2"]
    process = begin([*words, *command(tmp_path / "run", "--multiprocess")], compiled, devices=2)
    end(process)
    assert measured(tmp_path / "run") == two_processes
