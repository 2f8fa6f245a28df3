"""What users of other libraries bring along: rewards of their own, several passes over a rollout, stop strings."""

import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from gspo import build, rl
from gspo.run.checkpoint import restore_params
from gspo.run.writers import read_jsonl
from gspo.types import UserError
from tests.rl.runs import RESULTS, completions, watch_updates
from tests.tiny_runs import assert_bit_equal, rl_config, state_of

MODULE = """
import os

def brevity(completions, prompts, answer, **kwargs):
    print("thinking")
    if os.path.exists("broken"):
        raise RuntimeError("no connection")
    return [(c == a) - 0.1 * len(c) for c, a in zip(completions, answer)]
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "brevity_of_mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("brevity_of_mine", None)


@pytest.mark.slow
def test_a_run_whose_reward_breaks_is_saved_where_it_stands_and_goes_on_when_it_is_mended(
    folder, here, monkeypatch, capfd
):
    # Catches: rollouts since the last checkpoint that are lost, a policy trained on rewards of 0, output of a reward in
    # the middle of the display, a resumed run that draws other completions.
    rewards = ("brevity_of_mine:brevity", "numeric_answer")
    config = rl_config(folder, rewards=rewards, **{"checkpoint.every": 5})
    rl.train(build.rl_plan(config), here / "unbroken")
    update, done = rl.update, []

    def breaking(*args):
        done.append(args)
        if len(done) == 2:
            (here / "broken").touch()
        return update(*args)

    with monkeypatch.context() as patch:
        patch.setattr(rl, "update", breaking)
        with pytest.raises(UserError) as error:
            rl.train(build.rl_plan(config), here / "run")
    assert str(error.value).startswith(
        "rollout 2: reward brevity_of_mine:brevity failed on 16 of 16 completions, more than rewards_max_errors=0.1 of "
        "them: RuntimeError: no connection; completion "
    )
    assert str(error.value).endswith("; the last good checkpoint is step 2") and "\n" not in str(error.value)
    assert "thinking" not in capfd.readouterr().out
    (here / "broken").unlink()
    rl.train(build.rl_plan(config), here / "run")
    for name in RESULTS:
        assert (here / "run" / name).read_bytes() == (here / "unbroken" / name).read_bytes(), name
    assert_bit_equal(state_of(config, here / "run")[1], state_of(config, here / "unbroken")[1])
    lines = read_jsonl(here / "run" / "metrics.jsonl")
    total = lines[0]["rewards/brevity_of_mine:brevity"] + lines[0]["rewards/numeric_answer"]
    assert lines[0]["reward/mean"] == pytest.approx(total) and lines[0]["reward/failed"] == 0


def test_a_reward_may_fail_now_and_then(folder, here):
    # Catches: a run that ends at the first odd completion where a share of them was allowed.
    (here / "broken").touch()
    config = rl_config(
        folder, rewards=("brevity_of_mine:brevity", "numeric_answer"), num_rollouts=1, rewards_max_errors=1.0
    )
    rl.train(build.rl_plan(config), here / "run")
    line = read_jsonl(here / "run" / "metrics.jsonl")[0]
    assert line["reward/failed"] == 1 and line["rewards/brevity_of_mine:brevity"] == 0


def test_a_run_begins_with_the_step_that_was_chosen(folder, plain, tmp_path):
    # Catches: the latest step in place of the chosen one, and a step that is missing found out about too late.
    config = rl_config(folder, init_from=f"{plain}@2", num_rollouts=1, rewards=("hash_answer",))
    rl.train(build.rl_plan(config), tmp_path / "run")  # no reward, no update
    abstract = rl.prepare(build.rl_plan(config)).steps.abstract.params
    ours, second, third = (restore_params(path, abstract)[1] for path in (tmp_path / "run", f"{plain}@2", plain))
    assert_bit_equal(ours, second)
    with pytest.raises(AssertionError):
        assert_bit_equal(second, third)
    with pytest.raises(UserError, match=r"init_from=.*@9: no checkpoint of step 9 can be read; there are steps 2, 3"):
        rl.train(build.rl_plan(rl_config(folder, init_from=f"{plain}@9")), tmp_path / "other")


def test_every_pass_uses_every_minibatch_and_shuffles_the_rollout_and_not_the_pass_before():
    # Catches: a first pass that is shuffled, a pass too many, shuffles of shuffles (whose order would depend on how
    # many passes were made before a resume), keys that passes, rollouts or seeds have in common.
    seen = []
    steps = SimpleNamespace(
        minibatches=lambda batch: (f"{batch}/0", f"{batch}/1"),
        reshuffled=lambda batch, key: f"{batch} by {key}",
        train_step=lambda state, part: (state, seen.append(part) or {}),
        critic_step=None,
    )
    rl.update(steps, SimpleNamespace(stale_params=()), "rollout", ["a", "b"])
    assert seen == [f"rollout{by}/{part}" for by in ("", " by a", " by b") for part in (0, 1)]
    keys = [
        tuple(jax.random.key_data(key).tolist())
        for seed in (0, 1)
        for index in (0, 1)
        for key in rl.shuffle_keys(SimpleNamespace(seed=seed, num_iterations=3), index)
    ]
    assert len(keys) == len(set(keys)) == 8
    assert rl.shuffle_keys(SimpleNamespace(seed=0, num_iterations=1), 0) == []


@pytest.mark.slow
def test_further_passes_over_a_rollout_have_its_rows_in_another_order_and_its_old_log_probs(
    folder, tmp_path, monkeypatch, updates
):
    # Catches: a pass that repeats the order of the one before, groups torn from their shared prompt, rows parted from
    # their old log-probs and advantages, log-probs taken anew, an order that is the same for every rollout.
    seen = []
    watch_updates(monkeypatch, lambda whole, part: seen.append((whole, part)))
    config = rl_config(folder, num_iterations=3, num_rollouts=2, **{"optimizer.learning_rate": 0.01})
    rl.train(build.rl_plan(config), tmp_path)
    assert len(seen) == 2 * 3 * 2 and [len(steps) for steps in updates] == [6, 6]

    def rows(batch):
        inputs = batch.inputs
        fields = (batch.tokens_BT, inputs.old_logp_BC, inputs.advantages_BC, batch.old_routes_LBTX.swapaxes(0, 1))
        return [b"".join(np.asarray(field[b]).tobytes() for field in fields) for b in range(len(batch.tokens_BT))]

    orders = []
    for rollout in range(2):
        passes = [seen[6 * rollout + 2 * i][0] for i in range(3)]
        parts = [rows(part) for _, part in seen[6 * rollout : 6 * rollout + 6]]
        first = rows(passes[0])
        assert parts[0] + parts[1] == first
        for i in (1, 2):
            again = parts[2 * i] + parts[2 * i + 1]
            assert sorted(again) == sorted(first)
            order = [first.index(row) for row in again]
            groups = np.array(order).reshape(-1, 4)  # num_generations
            assert (groups % 4 == np.arange(4)).all() and (np.diff(groups, axis=1) == 1).all()
            orders.append(tuple(order))
    assert len(set(orders)) > 1  # of 24 orders each
    assert updates[0][0]["log_ratio/abs_max"] < 1e-4 < updates[0][2]["log_ratio/abs_max"]
    monkeypatch.undo()
    again = tmp_path / "again"
    rl.train(build.rl_plan(config), again)
    assert (again / "metrics.jsonl").read_bytes() == (tmp_path / "metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_a_run_with_stop_strings_trains_on_what_stands_before_them(folder, tmp_path, monkeypatch):
    # Catches: tokens after a stop string that are trained on, a completion that ended at one counted as cut off,
    # sampler and learner that no longer agree (the run would stop), evaluation that reads on.
    seen = []
    watch_updates(monkeypatch, lambda whole, part: seen.append(whole))
    changes = {"stop_strings": ("1", " ="), "router_replay.mode": "R3", "old_logps": "learner", "log.num_samples": 16}
    config = rl_config(folder, **changes)
    line = rl.train(build.rl_plan(config), tmp_path)
    texts = [text for rollout in completions(tmp_path) for text in rollout]
    assert len(texts) == 48 and any("1" in text for text in texts) and any(" =" in text for text in texts)
    assert all(text.find("1") in (-1, len(text) - 1) and text.find(" =") in (-1, len(text) - 2) for text in texts)
    width = config.max_completion_length
    for batch in seen:
        inputs, lengths_B = batch.inputs, np.asarray(batch.completion_lengths_B)
        assert (np.asarray(inputs.mask_BC) == (np.arange(width) < lengths_B[:, None])).all()
        assert (np.asarray(inputs.sampler_logp_BC)[~np.asarray(inputs.mask_BC)] == 0).all()
    assert line["eval/mean_length"] < width
