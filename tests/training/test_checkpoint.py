"""Checkpoints: round trips, and damage that is named rather than believed."""

import concurrent.futures
import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from bn_research.training import checkpoint, manifest
from bn_research.training.checkpoint import Checkpointer, CheckpointError
from bn_research.training.state import create_train_state

ROOT = Path(__file__).parents[2]


def init(key):
    return {
        "params": {"w": jax.random.normal(key, (37, 41)), "b": jnp.arange(5, dtype=jnp.bfloat16)},
        "batch_stats": {"mean": jnp.full(5, 0.25), "var": jnp.ones(5)},
    }


def create_state(seed=0, optimizer=None):
    return create_train_state(init, optimizer or optax.adam(0.1), jax.random.key(seed))


def raw(leaf):
    key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if key else leaf)


def same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(raw(x), raw(y))


def is_one_line(error):
    message = str(error.value)
    assert message and "\n" not in message and "checkpoint" in message
    return message


def test_round_trip(tmp_path):
    """A train state with Adam's and a typed key, beside plain arrays; the key still draws."""
    tree = {"state": create_state(), "loss": np.array([1.5, np.nan], np.float32)}
    note = {"name": "a", "steps": 4, "nested": {"x": [1, 2.5, None]}}
    first = Checkpointer(tmp_path / "made" / "here")
    assert first.newest() is None
    first.save(3, tree, note)
    first.close()
    again = Checkpointer(tmp_path / "made" / "here")
    assert again.newest() == (3, note)
    for template in (tree, jax.eval_shape(lambda: {**tree, "state": create_state(1)})):
        restored = again.restore(3, template)
        same_bits(restored["state"], tree["state"])
        np.testing.assert_array_equal(restored["loss"], tree["loss"])
    np.testing.assert_array_equal(
        jax.random.normal(restored["state"].key, (3,)), jax.random.normal(tree["state"].key, (3,))
    )


def test_arrays_of_the_host_stay_there(tmp_path):
    """With all their bits, which a device of 32 bits would not hold."""
    wide = np.arange(7) / 3 * 2**40
    tree = {"f8": wide, "i8": wide.astype(np.int64), "b": wide > 0, "scalar": np.array(wide[1])}
    tree["bf16"] = wide.astype(jnp.bfloat16)
    saver = Checkpointer(tmp_path)
    saver.save(1, tree, {})
    restored = saver.restore(1, jax.tree.map(np.zeros_like, tree))
    assert all(isinstance(x, np.ndarray) for x in restored.values())
    same_bits(restored, tree)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_keys_of_every_kind(tmp_path, impl):
    tree = {"key": jax.random.key(7, impl=impl), "keys": jax.random.split(jax.random.key(1), 3)}
    saver = Checkpointer(tmp_path)
    saver.save(1, tree, {})
    restored = saver.restore(1, tree)
    same_bits(restored, tree)


def test_the_newest_are_kept(tmp_path):
    """By number, not by name."""
    saver = Checkpointer(tmp_path, max_to_keep=2)
    for number in (1, 2, 9, 10):
        saver.save(number, {"x": jnp.full(3, number)}, {"n": number})
    assert saver.newest() == (10, {"n": 10})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["10", "9"]
    for number in (9, 10):
        restored = saver.restore(number, {"x": jnp.zeros(3, int)})
        np.testing.assert_array_equal(restored["x"], [number] * 3)


def test_three_are_kept(tmp_path):
    saver = Checkpointer(tmp_path)
    for number in range(5):
        saver.save(number, {"x": jnp.full(3, number)}, {})
    saver.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3", "4"]


def test_without_a_checkpoint(tmp_path):
    saver = Checkpointer(tmp_path)
    assert saver.newest() is None
    with pytest.raises(CheckpointError) as error:
        saver.restore(1, create_state())
    is_one_line(error)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError) as error:
        Checkpointer(tmp_path / "file" / "checkpoints")
    assert "Not a directory" in is_one_line(error)


# --- saving in the background ---


def replicated():
    return NamedSharding(Mesh(np.array(jax.devices()[:4]), ("batch",)), P())


@pytest.mark.parametrize("sharding", [None, replicated], ids=["one device", "four devices"])
def test_a_saved_state_may_be_donated_and_overwritten(tmp_path, sharding):
    """Host memory of a CPU is device memory: were it reused, a later step would be saved."""
    start = {f"x{i}": np.full((300, 101), float(i), np.float32) for i in range(20)}
    state = jax.device_put(start, sharding and sharding())
    add = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    loss, note = np.zeros(1000, np.float32), {"list": [0]}
    state = add(state)  # buffers that XLA made itself
    saver = Checkpointer(tmp_path)
    saver.save(1, {"state": state, "loss": loss}, note)
    loss[:], note["list"][0] = 7, 7
    for _ in range(20):
        state = add(state)
    jax.block_until_ready(state)
    assert saver.newest() == (1, {"list": [0]})
    restored = saver.restore(1, {"state": state, "loss": loss})
    np.testing.assert_array_equal(restored["loss"], np.zeros(1000))
    for name, x in start.items():
        np.testing.assert_array_equal(restored["state"][name], x + 1)
        expected = sharding() if sharding else SingleDeviceSharding(jax.devices()[0])
        assert restored["state"][name].sharding == expected


@pytest.fixture
def held(monkeypatch):
    """Holds the background back, after orbax's files, until the event is set."""
    event = threading.Event()

    def write_manifest(*args):
        assert event.wait(60)
        manifest.write_manifest(*args)

    monkeypatch.setattr(checkpoint, "write_manifest", write_manifest)
    yield event
    event.set()


def test_save_returns_before_the_checkpoint_is_there(tmp_path, held):
    saver = Checkpointer(tmp_path)
    saver.save(1, create_state(), {})
    assert not (tmp_path / "1").exists()
    held.set()
    saver.wait()
    assert (tmp_path / "1").exists()
    saver.save(2, create_state(), {}, wait=True)
    assert (tmp_path / "2").exists()


def test_a_checkpoint_is_never_seen_without_its_manifest(tmp_path, held):
    """However long it takes; and one that was cut off there is removed by the next start."""
    saver = Checkpointer(tmp_path)
    saver.save(1, create_state(), {})
    deadline = time.monotonic() + 60
    while not (tmp_path / "1.saving").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [p.name for p in tmp_path.iterdir()] == ["1.saving"]
    copy = tmp_path.with_name("copy")
    shutil.copytree(tmp_path, copy)
    assert Checkpointer(copy).newest() is None
    assert list(copy.iterdir()) == []


@pytest.mark.parametrize("surfaces_in", ["save", "wait", "newest", "restore", "close"])
def test_a_save_that_failed_is_told_by_the_next_call(tmp_path, monkeypatch, surfaces_in, capfd):
    state = create_state()
    saver = Checkpointer(tmp_path)
    saver.save(1, state, {"n": 1}, wait=True)

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "write_manifest", full)
    saver.save(2, state, {"n": 2})
    concurrent.futures.wait([saver._pending])
    monkeypatch.undo()
    calls = {
        "save": lambda: saver.save(3, state, {}),
        "wait": saver.wait,
        "newest": saver.newest,
        "restore": lambda: saver.restore(1, state),
        "close": saver.close,
    }
    with pytest.raises(CheckpointError) as error:
        calls[surfaces_in]()
    message = is_one_line(error)
    assert str(tmp_path / "2") in message and "No space left on device" in message
    assert [p.name for p in tmp_path.iterdir()] == ["1"]
    again = saver if surfaces_in != "close" else Checkpointer(tmp_path)
    assert again.newest() == (1, {"n": 1})  # told once
    again.save(2, state, {"n": 2})  # the disk has room again
    assert again.newest() == (2, {"n": 2})
    assert capfd.readouterr() == ("", "")


def test_a_number_is_not_taken_twice(tmp_path):
    saver = Checkpointer(tmp_path)
    saver.save(1, {"x": jnp.zeros(3)}, {})
    with pytest.raises(CheckpointError) as error:
        saver.save(1, {"x": jnp.ones(3)}, {})
    assert str(tmp_path / "1") in is_one_line(error)
    np.testing.assert_array_equal(saver.restore(1, {"x": jnp.ones(3)})["x"], np.zeros(3))


FILL = """
import sys
import jax.numpy as jnp
from bn_research.training.checkpoint import Checkpointer, CheckpointError

saver = Checkpointer(sys.argv[1])
try:
    for number in range(1, 100):
        saver.save(number, {f"x{i}": jnp.full(20000, float(number)) for i in range(20)}, {})
except CheckpointError as error:
    print(number, error)
"""


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=7m", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a file system cannot be mounted")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(small_disk):
    """Room for more than four checkpoints of 1.6 MB, of which three are kept, is not there."""
    (small_disk / "ballast").write_bytes(bytes(1 << 20))
    command = [sys.executable, "-c", FILL, str(small_disk / "checkpoints")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    number, message = result.stdout.strip().split(" ", 1)
    assert "\n" not in message and "No space left on device" in message
    failed = small_disk / "checkpoints" / str(int(number) - 1)
    assert f"checkpoint {failed} cannot be written" in message
    kept = sorted(p.name for p in (small_disk / "checkpoints").iterdir())
    assert kept == ["1", "2", "3"][: len(kept)] and len(kept) >= 2
    saver = Checkpointer(small_disk / "checkpoints")
    newest = int(kept[-1])
    assert saver.newest() == (newest, {})
    for number in range(1, newest + 1):
        restored = saver.restore(number, {f"x{i}": np.zeros(20000, "f4") for i in range(20)})
        assert all(np.all(np.asarray(x) == number) for x in restored.values())
    saver.close()


# --- damage ---


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with one checkpoint, what it holds, and its files."""
    folder = tmp_path_factory.mktemp("saved")
    state = create_state(optimizer=optax.sgd(0.1))
    note = {"name": "run", "steps": 12, "diverged": 0}
    saver = Checkpointer(folder)
    saver.save(1, state, note)
    saver.close()
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert len(files) >= 5
    return folder, state, note, files


def damage(path, how):
    content = path.read_bytes()
    if how == "half":
        path.write_bytes(content[: len(content) // 2])
    elif how == "flipped":
        path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    else:
        path.unlink()


def snapshot(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("how", ["half", "flipped", "absent"])
def test_every_damaged_file(saved, tmp_path, how, capfd):
    """Each file in turn is named, by whatever reads it; what is there stays as it is."""
    folder, state, _, files = saved
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    saver = Checkpointer(copy)
    for name in files:
        damage(copy / name, how)
        before = snapshot(copy)
        for action in (saver.newest, lambda: saver.restore(1, state)):
            with pytest.raises(CheckpointError) as error:
                action()
            message = is_one_line(error)
            assert str(copy / "1") in message and "damaged or cut" in message
            assert str(Path(name).relative_to("1")) in message and "--workdir" in message
        assert snapshot(copy) == before
        shutil.copyfile(folder / name, copy / name)
    assert saver.newest() is not None
    assert capfd.readouterr() == ("", "")


def test_a_damaged_newest_is_passed_over(saved, tmp_path, capfd):
    """For the one before the last two; nothing is lost, and their numbers are free again."""
    for number in (1, 2, 3, 4):
        shutil.copytree(saved[0] / "1", tmp_path / str(number))
    _, state, note, files = saved
    damage(tmp_path / "4" / "manifest.json", "absent")
    data = max(files, key=lambda name: (saved[0] / name).stat().st_size)
    damage(tmp_path / "3" / Path(data).relative_to("1"), "half")
    damaged = {number: snapshot(tmp_path / number) for number in ("3", "4")}
    saver = Checkpointer(tmp_path)
    assert saver.newest() == (2, note)
    printed = capfd.readouterr()
    lines = printed.err.splitlines()
    assert printed.out == "" and len(lines) == 2
    for number, why, line in zip("43", ["manifest.json is missing", "/d/"], lines, strict=True):
        assert f"checkpoint {tmp_path / number} is damaged" in line and why in line
        assert "going on from checkpoint 2" in line and f"{number}.damaged" in line
    same_bits(saver.restore(2, state), state)
    assert saver.newest() == (2, note)
    later = create_state(5, optax.sgd(0.1))
    for number in (3, 4, 5, 6):
        saver.save(number, later, {"n": number})
    saver.close()
    assert capfd.readouterr() == ("", "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3.damaged", "4", "4.damaged", "5", "6"]
    assert {n: snapshot(tmp_path / f"{n}.damaged") for n in ("3", "4")} == damaged
    damage(tmp_path / "6" / "manifest.json", "half")
    damage(tmp_path / "5" / "manifest.json", "half")
    shutil.copytree(tmp_path / "5", tmp_path / "5.damaged")
    again = Checkpointer(tmp_path)
    assert again.newest() == (4, {"n": 4})
    assert {"5.damaged", "5.damaged-2", "6.damaged"} < {p.name for p in tmp_path.iterdir()}
    same_bits(again.restore(4, state), later)


READ_WRONG = """
import sys
from pathlib import Path
import jax.numpy as jnp
from bn_research.training.checkpoint import Checkpointer, CheckpointError
from bn_research.training.manifest import read_manifest, write_manifest

for folder in map(Path, sys.argv[1:]):
    content = read_manifest(folder / "1", check_files=False)
    write_manifest(folder / "1", {name: content[name] for name in ("note", "leaves")})
    saver = Checkpointer(folder)
    assert saver.newest() == (1, {})
    try:
        saver.restore(1, {"x": jnp.zeros((37, 41)), "y": jnp.zeros(3), "z": jnp.zeros(2)})
    except CheckpointError as error:
        print(error)
    saver.close()
"""


def test_what_orbax_cannot_read(tmp_path):
    """As that of another version, though the digests are right: in one line, also at the end."""
    saver = Checkpointer(tmp_path / "whole")
    saver.save(1, {"x": jnp.ones((37, 41)), "y": jnp.ones(3), "z": jnp.ones(2)}, {})
    saver.close()
    folders = []
    for path in sorted((tmp_path / "whole").rglob("*")):
        for how in ("half", "absent") if path.is_file() and path.name != "manifest.json" else ():
            folders.append(tmp_path / str(len(folders)))
            shutil.copytree(tmp_path / "whole", folders[-1])
            damage(folders[-1] / path.relative_to(tmp_path / "whole"), how)
    command = [sys.executable, "-c", READ_WRONG, *map(str, folders)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert len(lines) >= 4 and all("cannot be read: " in line for line in lines)


def other_shape(state):
    return state._replace(params={**state.params, "w": jnp.zeros((37, 40))})


def other_dtype(state):
    return state._replace(params={**state.params, "w": jnp.zeros((37, 41), jnp.bfloat16)})


def more_leaves(state):
    return state._replace(params={**state.params, "extra": jnp.zeros(2)})


def fewer_leaves(state):
    return state._replace(params={"w": state.params["w"]})


def other_names(state):
    return state._replace(params={"v": state.params["w"], "b": state.params["b"]})


def no_batch_stats(state):
    return state._replace(batch_stats={})


def other_optimizer(state):
    return create_state(optimizer=optax.sgd(0.1, momentum=0.9))


@pytest.mark.parametrize(
    "change",
    [other_shape, other_dtype, more_leaves, fewer_leaves, other_names, no_batch_stats]
    + [other_optimizer],
)
def test_template_of_another_model(saved, change, capfd):
    folder, state, _, _ = saved
    saver = Checkpointer(folder)
    with pytest.raises(CheckpointError) as error:
        saver.restore(1, change(state))
    assert str(folder / "1") in is_one_line(error)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "unfinished",
    ["2.saving.orbax-checkpoint-tmp", "2.saving", "0.dropped", "2.orbax-checkpoint-tmp-1763866800"],
)
def test_what_a_killed_process_left_is_removed(saved, tmp_path, unfinished, capfd):
    """And nothing else; the next save of the same number succeeds."""
    folder, state, note, _ = saved
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for name in (unfinished, "2.damaged", "2.kept by hand"):
        shutil.copytree(copy / "1", copy / name)
    damage(copy / unfinished / "manifest.json", "absent")
    saver = Checkpointer(copy)
    assert sorted(p.name for p in copy.iterdir()) == ["1", "2.damaged", "2.kept by hand"]
    assert saver.newest() == (1, note)
    same_bits(saver.restore(1, state), state)
    later = create_state(5, optax.sgd(0.1))
    saver.save(2, later, {"n": 2})
    assert saver.newest() == (2, {"n": 2})
    same_bits(saver.restore(2, state), later)
    assert capfd.readouterr() == ("", "")


def test_saving_prints_nothing(tmp_path, capfd):
    saver = Checkpointer(tmp_path)
    saver.save(1, create_state(), {})
    saver.save(2, create_state(), {})
    saver.newest()
    saver.close()
    assert capfd.readouterr() == ("", "")


# --- processes that are killed, and more than one ---

# Each trial is a fork of a process that has imported everything and touched no device.
KILL = r"""
import os, random, signal, sys, time, traceback
import jax
import jax.numpy as jnp
import numpy as np
from bn_research.training.checkpoint import Checkpointer

def state(number):
    x = np.random.default_rng(number).random((64, 100), np.float32)
    return {"x": jnp.asarray(x), "y": 2 * x, "n": np.full(9, number)}

def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]

def go_on(folder, acknowledged, pipe):
    saver = Checkpointer(folder)
    newest = saver.newest()
    number = newest[0] if newest else 0
    assert number >= acknowledged, (number, acknowledged)
    if newest:
        assert newest[1] == {"n": number}, newest
        assert bits(saver.restore(number, state(0))) == bits(state(number)), number
    os.write(pipe, b"0\n")
    while True:
        number += 1
        saver.save(number, state(number), {"n": number})
        if number % 2 == 0:
            saver.wait()
            os.write(pipe, b"%d\n" % number)

random.seed(int(sys.argv[2]))
acknowledged, end = 0, time.monotonic() + float(sys.argv[3])
trials = 0
while time.monotonic() < end:
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ours)
        try:
            go_on(sys.argv[1], acknowledged, theirs)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    os.close(theirs)
    told = os.fdopen(ours, "rb")
    assert told.readline() == b"0\n", "a checkpoint was lost or wrong"
    time.sleep(random.uniform(0, 0.4))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    acknowledged = max([acknowledged, *map(int, told.read().split())])
    trials += 1
print(trials, acknowledged)
"""


def test_killed_at_any_moment_of_a_save(tmp_path):
    """SIGKILL, again and again: the newest has the right bits; none that wait() saw is lost."""
    command = [sys.executable, "-c", KILL, str(tmp_path / "run"), "1", "12"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=100)
    assert (result.returncode, result.stderr) == (0, ""), result.stderr
    trials, acknowledged = map(int, result.stdout.split())
    assert trials >= 5 and acknowledged >= 10


TWO = """
import sys, time
import jax
jax.config.update("jax_num_cpu_devices", 2)
address, process, folder, task = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
jax.distributed.initialize(address, 2, process)
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from bn_research.training.checkpoint import Checkpointer, CheckpointError

everywhere = NamedSharding(Mesh(np.array(jax.devices()), ("batch",)), P())

def make(seed):
    key = jax.random.fold_in(jax.random.key(0), seed)
    return {"key": key, "x": jax.random.normal(key, (300, 101)), "n": jnp.int32(seed)}

make = jax.jit(make, out_shardings=everywhere)
draw = jax.jit(lambda s: (jax.random.normal(s["key"], (5,)), s["x"], s["n"]))
split = NamedSharding(everywhere.mesh, P("batch"))
batch = jax.make_array_from_callback((4,), split, lambda rows: np.arange(4.0)[rows])

def step(state, batch):  # with a collective, to be in the way of those of a save
    return {**state, "x": state["x"] + jnp.sum(batch)}

step = jax.jit(step, donate_argnums=0)

def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(draw(a), draw(b)))

saver = Checkpointer(folder)
try:
    newest = saver.newest()
except CheckpointError as error:
    print("refused", error, flush=True)
    sys.exit(2)
number = newest[0] if newest else 0
print("newest", newest, flush=True)
if newest:
    restored = saver.restore(number, {"state": make(0), "loss": np.zeros(3)})
    assert restored["state"]["x"].sharding == everywhere
    assert same(restored["state"], make(number))
    assert np.array_equal(restored["loss"], np.full(3, float(number)))
for number in range(number + 1, 1000 if task == "run" else number + 4):
    state, loss = make(number), np.full(3, float(number))
    saver.save(number, {"state": state, "loss": loss}, {"n": number})
    loss[:] = 0
    for _ in range(20):
        state = step(state, batch)
saver.close()
print("end", number, flush=True)
"""


def start_two(folder, task):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", TWO, address, str(process), str(folder), task],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        for process in range(2)
    ]


def finish(processes, timeout=90):
    """Exit statuses, lines that TWO printed, and what orbax or we wrote on stderr."""
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    # Gloo writes there too, from a thread for each device, into each other's lines.
    ours = ("newest ", "refused ", "end ")
    lines = [[line for line in out.splitlines() if line.startswith(ours)] for out, _ in outputs]
    errors = [err for _, err in outputs]
    return [process.returncode for process in processes], lines, errors


def test_two_processes_killed_while_saving_go_on_together(tmp_path):
    """Both killed, the newest damaged, both started again; then all are damaged."""
    processes = start_two(tmp_path, "run")
    deadline = time.monotonic() + 90
    while not (tmp_path / "4").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
        assert all(process.poll() is None for process in processes)
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
    finish(processes)
    numbers = sorted(int(p.name) for p in tmp_path.iterdir() if p.name.isdigit())
    assert len(numbers) >= 3  # a fourth where dropping the oldest was cut off
    newest, before = numbers[-1], numbers[-2]
    damage(tmp_path / str(newest) / "_METADATA", "half")

    statuses, lines, errors = finish(start_two(tmp_path, "again"))
    assert statuses == [0, 0], errors
    expected = [f"newest ({before}, {{'n': {before}}})", f"end {before + 3}"]
    assert lines == [expected, expected]
    said = [[line for line in error.splitlines() if "checkpoint" in line] for error in errors]
    assert len(said[0]) == 1 and said[1] == []
    assert f"{tmp_path / str(newest)} is damaged" in said[0][0]
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == sorted([*map(str, range(before + 1, before + 4)), f"{newest}.damaged"])

    for path in tmp_path.glob("*/manifest.json"):
        damage(path, "half")
    statuses, lines, errors = finish(start_two(tmp_path, "again"))
    assert 0 not in statuses
    assert [len(each) for each in lines] == [1, 1]
    assert "damaged or cut" in lines[0][0] and "process 0" in lines[1][0]
