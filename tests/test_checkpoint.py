"""Checkpoints: round trips, and damage that is named rather than believed."""

import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bn_research.training.checkpoint import Checkpointer, CheckpointError
from bn_research.training.state import create_train_state


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
    again.verify()


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_keys_of_every_kind(tmp_path, impl):
    tree = {"key": jax.random.key(7, impl=impl), "keys": jax.random.split(jax.random.key(1), 3)}
    saver = Checkpointer(tmp_path)
    saver.save(1, tree, {})
    restored = saver.restore(1, tree)
    same_bits(restored, tree)


def test_the_newest_is_kept(tmp_path):
    saver = Checkpointer(tmp_path)
    for number in (1, 2, 10):
        saver.save(number, {"x": jnp.full(3, number)}, {"n": number})
    assert saver.newest() == (10, {"n": 10})
    np.testing.assert_array_equal(saver.restore(10, {"x": jnp.zeros(3, int)})["x"], [10] * 3)
    assert [p.name for p in tmp_path.iterdir() if p.name.isdigit()] == ["10"]


def test_max_to_keep(tmp_path):
    saver = Checkpointer(tmp_path, max_to_keep=2)
    for number in (1, 2, 3):
        saver.save(number, {"x": jnp.full(3, number)}, {})
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.isdigit()) == ["2", "3"]
    np.testing.assert_array_equal(saver.restore(2, {"x": jnp.zeros(3, int)})["x"], [2] * 3)


def test_without_a_checkpoint(tmp_path):
    saver = Checkpointer(tmp_path)
    saver.verify()
    assert saver.newest() is None
    with pytest.raises(CheckpointError) as error:
        saver.restore(1, create_state())
    is_one_line(error)


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


def check_damaged(folder, state, note):
    """Either the right bits or a CheckpointError of one line; returns the errors."""
    errors = []

    def attempt(action, expected):
        try:
            got = action()
        except CheckpointError as error:
            assert str(error) and "\n" not in str(error)
            errors.append(str(error))
            return
        if expected is not None:
            expected(got)

    def right_note(got):
        assert got == (1, note)

    saver = Checkpointer(folder)
    attempt(saver.newest, right_note)
    attempt(lambda: saver.restore(1, state), lambda got: same_bits(got, state))
    attempt(saver.verify, None)
    saver.close()
    return errors


def damage(path, how):
    content = path.read_bytes()
    if how == "half":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["half", "absent"])
def test_every_damaged_file(saved, tmp_path, how, capfd):
    """Each file in turn: the right bits or one line that says so."""
    folder, state, note, files = saved
    wrong, harmful = {}, 0
    capfd.readouterr()
    for i, name in enumerate(files):
        copy = tmp_path / str(i)
        shutil.copytree(folder, copy)
        damage(copy / name, how)
        try:
            harmful += bool(check_damaged(copy, state, note))
        except BaseException as error:
            wrong[name] = f"{type(error).__name__}: {str(error)[:200]}"
        printed = capfd.readouterr()
        if printed.out or printed.err:
            wrong[f"{name} (printed)"] = printed.err[:200] + printed.out[:200]
    assert not wrong, wrong
    assert harmful


READ_DAMAGED = """
import sys
import jax.numpy as jnp
from bn_research.training.checkpoint import Checkpointer, CheckpointError

for folder in sys.argv[1:]:
    saver = Checkpointer(folder)
    template = {"x": jnp.zeros((37, 41)), "y": jnp.zeros(3), "z": jnp.zeros(2)}
    for action in (saver.newest, lambda: saver.restore(1, template), saver.verify):
        try:
            action()
        except CheckpointError as error:
            print(error)
    saver.close()
"""


def test_reads_that_failed_leave_nothing_on_stderr(tmp_path):
    """Not when they are abandoned, collected or the process ends; in a process of its own."""
    saver = Checkpointer(tmp_path / "whole")
    saver.save(1, {"x": jnp.ones((37, 41)), "y": jnp.ones(3), "z": jnp.ones(2)}, {})
    saver.close()
    folders = []
    for path in sorted((tmp_path / "whole").rglob("*")):
        for how in ("half", "absent") if path.is_file() else ():
            folders.append(tmp_path / str(len(folders)))
            shutil.copytree(tmp_path / "whole", folders[-1])
            damage(folders[-1] / path.relative_to(tmp_path / "whole"), how)
    result = subprocess.run(
        [sys.executable, "-c", READ_DAMAGED, *map(str, folders)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert result.returncode == 0 and "is damaged or cut" in result.stdout
    assert result.stderr == ""


def test_verify_tells_damage_from_health(saved, tmp_path):
    folder, state, note, files = saved
    assert check_damaged(folder, state, note) == []
    data = max((folder / name for name in files), key=lambda path: path.stat().st_size)
    shutil.copytree(folder, tmp_path / "copy")
    damage(tmp_path / "copy" / data.relative_to(folder), "half")
    with pytest.raises(CheckpointError) as error:
        Checkpointer(tmp_path / "copy").verify()
    message = is_one_line(error)
    assert str(tmp_path / "copy" / "1") in message and "--workdir" in message


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


@pytest.mark.parametrize("tmp", ["2.orbax-checkpoint-tmp", "2.orbax-checkpoint-tmp-1763866800"])
def test_a_save_killed_half_way_is_ignored(saved, tmp_path, tmp, capfd):
    """And the next save of the same number succeeds."""
    folder, state, note, _ = saved
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    shutil.copytree(copy / "1", copy / tmp)
    for path in list((copy / tmp).rglob("*"))[::2]:
        if path.is_file():
            path.unlink()
    saver = Checkpointer(copy)
    assert saver.newest() == (1, note)
    same_bits(saver.restore(1, state), state)
    later = create_state(5, optax.sgd(0.1))
    saver.save(2, later, {"n": 2})
    saver.close()
    again = Checkpointer(copy)
    assert again.newest() == (2, {"n": 2})
    same_bits(again.restore(2, state), later)
    assert capfd.readouterr() == ("", "")


def test_saving_prints_nothing(tmp_path, capfd):
    saver = Checkpointer(tmp_path)
    saver.save(1, create_state(), {})
    saver.save(2, create_state(), {})
    saver.newest()
    saver.close()
    assert capfd.readouterr() == ("", "")
