"""A run begins, is refused, goes on; killed anywhere and resumed, it ends like one never killed."""

import os
import shutil
import signal
import sys
import time

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

from gspo import build, rl
from gspo.run import checkpoint
from gspo.run.writers import read_jsonl
from gspo.steps import initial_state
from gspo.types import UserError
from tests.processes import finished
from tests.rl.runs import RESULTS
from tests.tiny_runs import (
    ROOT,
    assert_bit_equal,
    contents,
    rl_config,
    state_of,
    stateful_config,
)


def test_init_from_starts_from_the_parameters_of_another_run(folder, plain, tmp_path):
    # Catches an init_from that is read too late, or that takes the optimizer and the step along.
    config = rl_config(folder, init_from=str(plain), num_rollouts=1, rewards=("hash_answer",))
    rl.train(build.rl_plan(config), tmp_path)
    step, state = state_of(config, tmp_path)
    assert_bit_equal(state.params, state_of(rl_config(folder), plain)[1].params)
    assert step == 1 and int(state.step) == 2


def test_a_finished_run_started_again_changes_nothing(folder, plain):
    # Catches lines written twice, a checkpoint saved anew, one more rollout.
    before = contents(plain)
    line = rl.train(build.rl_plan(rl_config(folder)), plain)
    assert contents(plain) == before
    assert line == {name: value for name, value in read_jsonl(plain / "metrics.jsonl")[-1].items() if name != "step"}


def test_a_failed_start_does_not_claim_the_workdir_for_its_config(folder, tmp_path):
    # Catches a mistyped init_from after which the corrected command is refused, because the config differs from the
    # mistaken one.
    with pytest.raises(UserError, match="no such folder"):
        rl.train(build.rl_plan(rl_config(folder, init_from=str(tmp_path / "nowhere"))), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists() and not any(contents(tmp_path / "run").values())


def test_a_changed_config_is_refused_by_name_and_taken_when_allowed(folder, plain, copy):
    # Catches a run that goes on under other settings without a word, and a flag that does nothing.
    longer = rl_config(folder, num_rollouts=4)
    with pytest.raises(UserError, match="num_rollouts: saved 3, now 4"):
        rl.train(build.rl_plan(longer), copy)
    assert contents(copy) == contents(plain)
    rl.train(build.rl_plan(longer), copy, allow_changed_config=True)
    lines = read_jsonl(copy / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert lines[:3] == read_jsonl(plain / "metrics.jsonl")[:3]


def test_a_checkpoint_of_another_model_stops_the_run_and_nothing_is_touched(folder, plain):
    # Catches a config.json replaced, or metrics cut, by a run that then cannot start.
    before = contents(plain)
    with pytest.raises(UserError, match=r"^model\.d_model=32: the weights in .* were trained with 16"):
        rl.train(build.rl_plan(rl_config(folder, **{"model.d_model": 32})), plain, allow_changed_config=True)
    assert contents(plain) == before


def test_a_truncated_checkpoint_falls_back_to_the_one_before_and_the_run_ends_the_same(folder, plain, copy, caplog):
    # Catches a run that starts from scratch over a damaged checkpoint, or that goes on with damaged arrays.
    largest = max(
        (path for path in (copy / "checkpoints" / "3").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    )
    largest.write_bytes(largest.read_bytes()[:-10])
    rl.train(build.rl_plan(rl_config(folder)), copy)
    assert any("falling back to step 2" in record.getMessage() for record in caplog.records)
    assert (copy / "metrics.jsonl").read_bytes() == (plain / "metrics.jsonl").read_bytes()
    assert_bit_equal(state_of(rl_config(folder), copy)[1], state_of(rl_config(folder), plain)[1])


@pytest.mark.parametrize(("seen", "message"), [
    (True, "rollout 1, update 0: loss or gradient is not finite; the last good checkpoint is step 1; lower "
           "optimizer.learning_rate"),
    (False, "step 2: params/[a-z/]+ is not finite; nothing was saved; the last good checkpoint is step 1"),
], ids=["in the loss", "in the parameters alone"])  # fmt: skip
def test_NaN_stops_the_run_and_the_last_good_checkpoint_is_kept(folder, tmp_path, monkeypatch, seen, message):
    # Catches NaN parameters saved over good ones, also where the last update of a rollout made them and no loss has
    # shown it yet.
    class Poisoned(rl.Collector):
        def __call__(self, state, cursor, *args):
            experience = super().__call__(state, cursor, *args)
            batch = experience.batch
            advantages_BC = batch.inputs.advantages_BC * (jnp.nan if cursor else 1.0)
            return experience._replace(batch=batch.replace(inputs=batch.inputs.replace(advantages_BC=advantages_BC)))

    monkeypatch.setattr(rl, "Collector", Poisoned)
    if not seen:
        monkeypatch.setattr(rl, "guard", lambda *_: None)
    with pytest.raises(UserError, match=message):
        rl.train(build.rl_plan(rl_config(folder)), tmp_path)
    step, state = state_of(rl_config(folder), tmp_path)
    assert step == 1 and all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state))
    assert os.listdir(tmp_path / "checkpoints") == ["1"]


def watched_parts(prepare, reached):
    """`rl.prepare`, such that reached("rollout") follows each rollout and reached("minibatch") precedes each update.
    The jitted functions stay the same."""

    def prepared(*args):
        run = prepare(*args)

        def collector(*args):
            experience = run.collector(*args)
            reached("rollout")
            return experience

        def train_step(*args):
            reached("minibatch")
            return run.steps.train_step(*args)

        return run._replace(collector=collector, steps=run.steps._replace(train_step=train_step))

    return prepared


WHEN = {  # place: at which of the times that a run comes there
    "rollout": 2,  # nothing is saved yet
    "minibatch": 14,  # the second update of the fourth rollout
    "save": 2,  # the arrays of the second checkpoint are written, nothing is in place
    "seal": 1,  # the first checkpoint is complete, its seal is not written
}
LEFT = {"rollout": set(), "minibatch": {"2"}, "save": {"2"}, "seal": {"2"}}  # complete checkpoints


def watch(patch, workdir, reached):
    """reached(place) is called where and WHEN the run in workdir comes to a place."""
    count = dict.fromkeys(WHEN, 0)

    def counted(place):
        count[place] += 1
        if count[place] == WHEN[place]:
            while place == "minibatch" and not (workdir / "checkpoints" / "2" / "SEAL.0").exists():
                time.sleep(0.01)  # so that there is a checkpoint to go on from
            reached(place)

    def hook(owner, attribute, place):
        function = getattr(owner, attribute)
        patch.setattr(owner, attribute, lambda *args, **kwargs: (counted(place), function(*args, **kwargs))[1])

    patch.setattr(rl, "prepare", watched_parts(rl.prepare, counted))
    hook(ocp.PyTreeCheckpointHandler, "finalize", "save")
    hook(checkpoint, "write_seal", "seal")


@pytest.fixture(scope="module")
def unbroken(folder):
    """The run that those which were killed are compared with. What a kill at a place would leave behind is in
    killed/<place> beside it."""
    workdir = folder / "unbroken"
    with pytest.MonkeyPatch.context() as patch:
        watch(patch, workdir, lambda place: shutil.copytree(workdir, folder / "killed" / place))
        rl.train(build.rl_plan(stateful_config(folder)), workdir)
    return workdir


def assert_ends_like(folder, workdir, unbroken):
    for name in RESULTS:
        assert (workdir / name).read_bytes() == (unbroken / name).read_bytes(), name
    (step, state), (want_step, want) = (state_of(stateful_config(folder), path) for path in (workdir, unbroken))
    assert step == want_step == 4
    assert_bit_equal(state, want)


def test_the_unbroken_run_moves_all_that_it_carries(folder, unbroken):
    # Catches a comparison of runs that would agree because nothing in them ever changes.
    run = rl.prepare(build.rl_plan(stateful_config(folder)))
    _, state = state_of(stateful_config(folder), unbroken)
    fresh = initial_state(build.rl_plan(stateful_config(folder)), run.steps.start)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), state, fresh)))
    assert state.ref_params is not None and state.entropy_coef is not None
    lines = read_jsonl(unbroken / "metrics.jsonl")
    assert (
        len({line["filter_groups/draws"] for line in lines[:4]}) > 1
    )  # so that the data position is no function of the step


def assert_goes_on_from(folder, workdir, place, unbroken):
    """What a kill at the place has left is what it should be, and the resumed run ends like the unbroken one."""
    assert {name for name in os.listdir(workdir / "checkpoints") if name.isdecimal()} == LEFT[place]
    assert (workdir / "checkpoints" / "2" / "SEAL.0").exists() == (place in ("minibatch", "save"))
    rl.train(build.rl_plan(stateful_config(folder)), workdir)
    assert_ends_like(folder, workdir, unbroken)


@pytest.mark.parametrize("place", WHEN)
def test_what_a_kill_leaves_anywhere_is_enough_to_end_bit_equal_to_a_run_never_killed(folder, unbroken, place):
    # Catches a lost optimizer, reference, bonus, key or data position; lines of metrics or samples twice or never; half
    # a checkpoint taken for a whole one.
    assert_goes_on_from(folder, folder / "killed" / place, place, unbroken)


VICTIM = '''
"""Runs `stateful_config` and dies at a place: python victim.py PLACE FOLDER WORKDIR"""
import os, signal, sys
from pathlib import Path

import pytest

from gspo import build, rl
from tests.rl.test_resume import watch
from tests.tiny_runs import stateful_config

place, folder, workdir = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
watch(pytest.MonkeyPatch(), workdir, lambda reached: reached == place and os.kill(os.getpid(), signal.SIGKILL))
rl.train(build.rl_plan(stateful_config(folder)), workdir)
'''


@pytest.mark.slow
@pytest.mark.parametrize("place", WHEN)
def test_a_run_killed_anywhere_and_resumed_ends_bit_equal_to_one_never_killed(folder, unbroken, tmp_path, place):
    # Catches what the copies above do not show: something outside the folder, or a lock, that a dead process leaves.
    (tmp_path / "victim.py").write_text(VICTIM)
    command = [sys.executable, tmp_path / "victim.py", place, folder, tmp_path / "run"]
    done = finished(command, timeout=300, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert_goes_on_from(folder, tmp_path / "run", place, unbroken)


def test_SIGTERM_saves_says_so_and_leaves_and_the_resumed_run_ends_the_same(
    folder, unbroken, tmp_path, monkeypatch, capsys
):
    # Catches a preempted job that loses its work since the last checkpoint, that leaves between two updates of a
    # rollout, or that a scheduler takes for a success.
    updates = []

    def terminated_at_the_ninth(place):
        updates.extend([place] * (place == "minibatch"))
        if place == "minibatch" and len(updates) == 9:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(rl, "prepare", watched_parts(rl.prepare, terminated_at_the_ninth))
    with pytest.raises(SystemExit) as stopped:
        rl.train(build.rl_plan(stateful_config(folder)), tmp_path)
    assert stopped.value.code == 143 and len(updates) == 12
    assert f"stopped by SIGTERM: saved rollout 3 in {tmp_path}" in capsys.readouterr().err
    assert state_of(stateful_config(folder), tmp_path)[0] == 3
    rl.train(build.rl_plan(stateful_config(folder)), tmp_path)
    assert_ends_like(folder, tmp_path, unbroken)


def test_a_signal_before_the_first_rollout_leaves_what_its_message_says(
    folder, unbroken, tmp_path, monkeypatch, capsys
):
    # Catches "saved rollout 0" where nothing was saved, and Ctrl-C that loses what SIGTERM keeps.
    prepare = rl.prepare

    def interrupted(*args):
        run = prepare(*args)
        return run._replace(evaluate=lambda params: (os.kill(os.getpid(), signal.SIGINT), run.evaluate(params))[1])

    with monkeypatch.context() as patch:
        patch.setattr(rl, "prepare", interrupted)
        with pytest.raises(SystemExit) as stopped:
            rl.train(build.rl_plan(stateful_config(folder)), tmp_path)
    assert stopped.value.code == 130 and "stopped by SIGINT: saved rollout 0" in capsys.readouterr().err
    assert state_of(stateful_config(folder), tmp_path)[0] == 0
    rl.train(build.rl_plan(stateful_config(folder)), tmp_path)
    assert_ends_like(folder, tmp_path, unbroken)
