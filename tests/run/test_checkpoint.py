"""Checkpoints: bit-equal, safe against donation, kills and damaged files."""

import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from gspo.run import stored
from gspo.run.checkpoint import Checkpointer, restore_params
from gspo.types import TrainState, UserError


def make_params(seed, width=4):
    key = jax.random.key(seed)
    return {"layers": {"kernel": jax.random.normal(key, (8, width)), "scale": jnp.ones((8,), jnp.bfloat16) * 1.1},
            "router": {"bias": None}, "none_yet": {}, "empty": jnp.zeros((0, 3))}  # fmt: skip


def make_state(seed, width=4):
    """bf16, int32, uint32, float32 with a NaN and a negative zero, None, empty dicts, empty arrays, empty optax
    states."""
    params = make_params(seed, width)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3), optax.identity())
    odd = jnp.array([jnp.nan, -0.0, jnp.inf, 1e-42], jnp.float32)
    return TrainState(
        jnp.int32(seed), params, (optimizer.init(params), odd, jax.random.key_data(jax.random.key(seed))), None
    )


def abstract(tree, sharding=None):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def assert_bit_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, g), w in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert (g.shape, g.dtype) == (w.shape, w.dtype), path
        assert np.asarray(g).tobytes() == np.asarray(w).tobytes(), path


def saved_run(workdir, steps=(1, 2), **options):
    with Checkpointer(workdir, keep_last=5, **options) as checkpointer:
        for step in steps:
            checkpointer.save(step, make_state(step), {"cursor": step * 10})
    return workdir / "checkpoints"


@pytest.mark.parametrize("async_save", [True, False])
def test_a_state_comes_back_bit_equal_with_its_meta(tmp_path, async_save):
    # Catches: bf16 through float32, None or EmptyState lost, NaN payloads, optimizer state or key data left out.
    saved_run(tmp_path, async_save=async_save)
    with Checkpointer(tmp_path, keep_last=5) as checkpointer:
        step, state, meta = checkpointer.restore(abstract(make_state(0)))
    assert (step, meta) == (2, {"cursor": 20})
    assert_bit_equal(state, make_state(2))


def test_an_empty_workdir_restores_to_none(tmp_path):
    # Catches: a first start that fails for lack of a checkpoint.
    with Checkpointer(tmp_path, keep_last=1) as checkpointer:
        assert checkpointer.restore(abstract(make_state(0))) is None


def test_a_checkpoint_of_eight_devices_restores_on_one_and_back(tmp_path):
    # Catches: shardings read from disk instead of from the tree that the caller asks for.
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("data"))
    state = {"params": {"w": jnp.arange(32.0).reshape(16, 2)}}
    with Checkpointer(tmp_path, keep_last=3) as checkpointer:
        checkpointer.save(1, jax.device_put(state, split), {})
        one = SingleDeviceSharding(jax.devices()[3])
        _, on_one, _ = checkpointer.restore(abstract(state, one))
        assert on_one["params"]["w"].sharding == one
        checkpointer.save(2, on_one, {})
        _, on_eight, _ = checkpointer.restore(abstract(state, split))
        assert on_eight["params"]["w"].sharding == split
    assert_bit_equal(on_one, state)
    assert_bit_equal(on_eight, state)
    assert_bit_equal(restore_params(tmp_path, abstract(state["params"]))[1], state["params"])


@pytest.mark.parametrize("sharded", [False, True])
def test_buffers_donated_right_after_an_asynchronous_save_are_saved_as_they_were(tmp_path, sharded):
    # Catches: a writer that reads zero-copy views of buffers which the next donated step overwrites (CPU).
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    where = NamedSharding(mesh, PartitionSpec("data")) if sharded else SingleDeviceSharding(jax.devices()[0])
    step_fn = jax.jit(lambda tree: jax.tree.map(lambda x: x * -3 + 1, tree), donate_argnums=0)
    state = {f"w{i}": jax.device_put(jax.random.normal(jax.random.key(i), (1024, 1024)), where) for i in range(4)}
    step_fn(jax.tree.map(jnp.copy, state))  # compiled before, so that the overwriting starts at once
    want = jax.tree.map(lambda x: np.array(x, copy=True), state)
    with Checkpointer(tmp_path, keep_last=1) as checkpointer:
        checkpointer.save(0, state, {})
        for _ in range(3):
            state = step_fn(state)
        jax.block_until_ready(state)
        _, restored, _ = checkpointer.restore(abstract(state))
        assert_bit_equal(restored, want)
        jax.block_until_ready(step_fn(restored))  # what came from disk can be donated too, and the disk does not change
        assert_bit_equal(checkpointer.restore(abstract(want, where))[1], want)


def test_every_damage_to_any_file_falls_back_to_the_step_before_and_says_so(tmp_path, caplog):
    # Catches: zeros or wrong values from a damaged file, a fallback without a word, a crash in the middle of restoring.
    root = saved_run(tmp_path)
    shutil.copytree(root / "2", tmp_path / "good")
    names = [
        path.relative_to(root / "2") for path in (root / "2").rglob("*") if path.is_file() and "SEAL" not in path.name
    ]
    assert len(names) > 5
    damages = {"deleted": None, "emptied": lambda data: b"", "cut": lambda data: data[:-1],
               "a bit flipped": lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]}  # fmt: skip
    for name in names:
        for damage, change in damages.items():
            file = root / "2" / name
            file.write_bytes(change(file.read_bytes())) if change else file.unlink()
            caplog.clear()
            with Checkpointer(tmp_path, keep_last=5) as checkpointer:
                step, state, meta = checkpointer.restore(abstract(make_state(0)))
            assert (step, meta) == (1, {"cursor": 10}), (name, damage)
            assert_bit_equal(state, make_state(1))
            (warning,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
            assert str(root / "2") in warning and "falling back to step 1" in warning and "\n" not in warning, (
                name,
                damage,
            )
            assert (root / "2.broken").exists()
            shutil.rmtree(root / "2.broken")
            shutil.copytree(tmp_path / "good", root / "2")


def test_a_truncated_checkpoint_without_a_seal_falls_back_too(tmp_path, capfd):
    # Catches: relying on the seal, which a process killed between the rename and the sealing never wrote.
    root = saved_run(tmp_path)
    largest = max((path for path in (root / "2").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    (root / "2" / "SEAL.0").unlink()
    with Checkpointer(tmp_path, keep_last=5) as checkpointer:
        assert checkpointer.restore(abstract(make_state(0)))[0] == 1


def test_the_step_of_a_damaged_checkpoint_can_be_saved_again(tmp_path):
    # Catches: Orbax refusing a step at or below the latest one that it saw on disk.
    root = saved_run(tmp_path, steps=(1, 2, 3))
    for step in (2, 3):
        (root / str(step) / "meta" / "metadata").unlink()
    with Checkpointer(tmp_path, keep_last=5) as checkpointer:
        assert checkpointer.restore(abstract(make_state(0)))[0] == 1
        assert checkpointer.steps() == [1]
        assert checkpointer.save(2, make_state(7), {})
        step, state, _ = checkpointer.restore(abstract(make_state(0)))
    assert step == 2
    assert_bit_equal(state, make_state(7))
    assert {"2.broken", "3.broken"} <= set(os.listdir(root))


@pytest.mark.parametrize("whose", ["policy", "critic"])
def test_parameters_that_are_not_finite_are_not_saved(tmp_path, whose):
    # Catches: a policy or a critic of NaN that pushes out the last good checkpoint.
    good = {"w": jnp.ones(2)}
    params = {"policy": good, "critic": good} | {whose: {"w": jnp.array([1.0, jnp.inf])}}
    critic = TrainState(jnp.int32(2), params["critic"], None)
    with Checkpointer(tmp_path, keep_last=1) as checkpointer:
        checkpointer.save(1, make_state(1), {})
        where = "critic/params/w" if whose == "critic" else "params/w"
        with pytest.raises(UserError, match=f"^step 2: {where} is not finite; nothing was saved; .* is step 1$"):
            checkpointer.save(2, TrainState(jnp.int32(2), params["policy"], None, critic=critic), {})
        assert checkpointer.steps() == [1]


def test_if_no_checkpoint_is_readable_the_run_stops_and_nothing_is_moved(tmp_path):
    # Catches: starting silently from scratch over a damaged run.
    root = saved_run(tmp_path)
    for step in (1, 2):
        (root / str(step) / "meta" / "metadata").write_text("")
    with Checkpointer(tmp_path, keep_last=5) as checkpointer:  # noqa: SIM117
        with pytest.raises(UserError, match=r"step 2: .*damaged.*step 1: .*damaged"):
            checkpointer.restore(abstract(make_state(0)))
    assert sorted(os.listdir(root)) == ["1", "2"]
    with pytest.raises(UserError, match="can be read"):
        restore_params(tmp_path, abstract(make_params(0)))


def test_a_checkpoint_of_another_shape_names_the_parameter_and_both_shapes(tmp_path):
    # Catches: truncated or padded weights, a page of traceback, an older checkpoint taken instead.
    root = saved_run(tmp_path)
    before = sorted(str(path) for path in root.rglob("*"))
    with Checkpointer(tmp_path, keep_last=5) as checkpointer:
        with pytest.raises(UserError) as error:
            checkpointer.restore(abstract(make_state(0, width=6)))
        assert "params/layers/kernel: saved float32[8, 4], now float32[8, 6]" in str(error.value)
        with pytest.raises(UserError, match=r"params/layers/scale: saved bfloat16\[8\], now float32\[8\]"):
            checkpointer.restore(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), make_state(0)))
        with pytest.raises(UserError, match=r"params/more: saved nothing, now float32\[2\]"):
            checkpointer.restore(abstract(make_state(0).replace(params=make_params(0) | {"more": jnp.zeros(2)})))
        with pytest.raises(UserError, match=r"params/empty: saved float32\[0, 3\], now absent"):
            smaller = make_params(0)
            del smaller["empty"]
            checkpointer.restore(abstract(make_state(0).replace(params=smaller)))
    with pytest.raises(UserError, match=r"params/layers/kernel: saved float32\[8, 4\], now float32\[8, 6\]"):
        restore_params(tmp_path, abstract(make_params(0, width=6)))
    assert sorted(str(path) for path in root.rglob("*")) == before


def test_parameters_alone_come_from_a_workdir_a_checkpoints_folder_or_a_step(tmp_path):
    # Catches: init_from that needs the optimizer of the other run, or that takes the wrong step.
    root = saved_run(tmp_path)
    target = abstract(make_params(0))
    for path, step in ((tmp_path, 2), (str(root), 2), (root / "1", 1)):
        got_step, params = restore_params(path, target)
        assert got_step == step
        assert_bit_equal(params, make_params(step))
    wider = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), make_params(0))
    assert restore_params(tmp_path, wider)[1]["layers"]["scale"].dtype == jnp.float32
    with pytest.raises(UserError, match="no such folder"):
        restore_params(tmp_path / "nowhere", target)
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="holds none"):
        restore_params(tmp_path / "bare", target)
    assert os.listdir(tmp_path / "bare") == []


def test_the_last_ones_and_the_best_are_kept_also_over_a_restart(tmp_path):
    # Catches: the best one deleted after a resume, NaN taken as the best, a later equal one not preferred, lowest kept.
    state = {"params": jnp.zeros(2)}
    scores = {1: 0.9, 2: 0.9, 3: float("nan"), 4: 0.2, 5: 0.1, 6: None, 7: 0.3}
    kept = {}
    for part in ((1, 2, 3), (4, 5, 6, 7)):
        with Checkpointer(tmp_path, keep_last=2, keep_best=True, best_metric="eval/pass@1") as checkpointer:
            for step in part:
                metrics = None if scores[step] is None else {"eval/pass@1": scores[step], "loss": -1.0}
                checkpointer.save(step, state, {}, metrics)
                checkpointer.wait()
                kept[step] = checkpointer.steps()
    assert kept == {1: [1], 2: [1, 2], 3: [2, 3], 4: [2, 3, 4], 5: [2, 4, 5], 6: [2, 5, 6], 7: [2, 6, 7]}


def test_keeping_the_best_without_a_metric_is_refused(tmp_path):
    # Catches: keep_best silently doing nothing.
    with pytest.raises(UserError, match="best_metric"):
        Checkpointer(tmp_path, keep_last=2, keep_best=2)
    with pytest.raises(UserError, match="keep_last"):
        Checkpointer(tmp_path, keep_last=0)


def test_a_step_that_is_there_is_left_alone_unless_forced(tmp_path):
    # Catches: a final save that fails, or that rewrites, the checkpoint of the last interval.
    with Checkpointer(tmp_path, keep_last=2) as checkpointer:
        assert checkpointer.save(1, make_state(1), {})
        assert not checkpointer.save(1, make_state(5), {})
        assert_bit_equal(checkpointer.restore(abstract(make_state(0)))[1], make_state(1))
        assert checkpointer.save(1, make_state(5), {}, force=True)
        assert_bit_equal(checkpointer.restore(abstract(make_state(0)))[1], make_state(5))
    assert os.listdir(tmp_path / "checkpoints") == ["1"]


KILLED = """
import os, signal, sys
import jax
from gspo.run.checkpoint import Checkpointer
checkpointer = Checkpointer(sys.argv[1], keep_last=1)
checkpointer.save(1, {"params": jax.random.normal(jax.random.key(1), (64,))}, {})
checkpointer.wait()
checkpointer.save(2, {"params": jax.random.normal(jax.random.key(2), (6 << 20,))}, {})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_during_a_save_leaves_the_checkpoint_before_and_no_rubbish(tmp_path):
    # Catches: the old step deleted before the new one is complete (keep_last=1), half a step taken for a whole one.
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=root, capture_output=True, text=True,
                            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)})  # fmt: skip
    assert result.returncode == -signal.SIGKILL, result.stderr
    left = os.listdir(tmp_path / "checkpoints")
    assert "1" in left and any("tmp" in name for name in left) and "2" not in left
    want = {"params": jax.random.normal(jax.random.key(1), (64,))}
    with Checkpointer(tmp_path, keep_last=1) as checkpointer:
        step, state, _ = checkpointer.restore(abstract(want))
        assert_bit_equal(state, want)
        assert step == 1
        checkpointer.save(2, want, {})
    assert os.listdir(tmp_path / "checkpoints") == ["2"]


def test_orbax_is_silent_below_a_warning(tmp_path, capfd, caplog):
    # Catches: about twenty lines of log per save between the lines of the run.
    caplog.set_level(logging.INFO, logger="absl")
    saved_run(tmp_path)
    assert [
        record for record in caplog.records if "orbax" in record.pathname and record.levelno < logging.WARNING
    ] == []


def test_a_path_may_choose_a_step_or_the_best_one(tmp_path):
    # Catches the latest taken for the best, the worst for the best, an unscored step among them, a folder whose name
    # has an @ of its own.
    root = tmp_path / "run"
    with Checkpointer(root, keep_last=5, async_save=False) as checkpointer:
        for step, score in ((1, 0.2), (2, 0.7), (3, 0.7), (4, 0.1), (5, None)):
            metrics = {} if score is None else {stored.BEST_METRIC: score}
            checkpointer.save(step, {"params": {"w": jnp.full(2, step)}}, {}, metrics)
    tree = {"w": jax.ShapeDtypeStruct((2,), jnp.int32)}
    for chosen, step in (("", 5), ("@best", 3), ("@2", 2)):
        found, params = restore_params(f"{root}{chosen}", tree)
        assert found == step and params["w"].tolist() == [step, step]
    assert stored.read_content(f"{root}@1")["metrics"] == {stored.BEST_METRIC: 0.2}
    for chosen, words in (("@9", "no checkpoint of step 9 can be read; there are steps 1, 2, 3, 4, 5"),):
        with pytest.raises(UserError, match=words):
            restore_params(f"{root}{chosen}", tree)
    odd = root.rename(tmp_path / "run@2")
    assert restore_params(odd, tree)[0] == 5 and restore_params(f"{odd}@4", tree)[0] == 4
    unscored = tmp_path / "unscored"
    with Checkpointer(unscored, async_save=False) as checkpointer:
        checkpointer.save(1, {"params": {"w": jnp.zeros(2)}}, {})
    with pytest.raises(UserError, match="no checkpoint was saved with an evaluation; there are steps 1"):
        restore_params(f"{unscored}@best", tree)
