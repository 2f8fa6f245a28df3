"""What a critic begins with, how it is trained beside the policy, and the rollouts in which it is trained alone."""

import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from gspo import build, masked, reward_model, rl, steps
from gspo.run.checkpoint import restore_params
from gspo.run.writers import read_jsonl
from gspo.steps import initial_state
from gspo.types import Diverged, UserError
from tests.rl.runs import RESULTS, train_logged
from tests.tiny_runs import assert_bit_equal, reward_model_config, rl_config, state_of

ON = {"critic.enable": True, "num_rollouts": 2, "eval.every": 0, "rewards": ("numeric_answer", "hash_answer")}


def first_state(config, workdir=""):
    plan = build.rl_plan(config, str(workdir))
    return initial_state(plan, rl.prepare(plan).steps.start)


# ---------------------------------------------------------------------------- what it begins with


@pytest.mark.parametrize("source", ["", "policy"])
def test_a_critic_begins_with_the_body_of_the_policy_or_with_random_weights(folder, source):
    # Catches a choice that does nothing, a body of other random weights, a last layer that expects something.
    state = first_state(rl_config(folder, **ON | {"critic.init_from": source}))
    body, own = state.critic.params["body"], {name: state.params[name] for name in state.critic.params["body"]}
    same = bool((body["embedding"] == own["embedding"]).all())
    assert same == (source == "policy")
    if same:
        assert_bit_equal(body, own)
        pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((body, own))]
        assert len(set(pointers)) == len(pointers)  # the first update donates the policy's
    assert not np.any(state.critic.params["value"])


@pytest.fixture(scope="module")
def judge(folder):
    """A reward model that is smaller than the policy, and dense."""
    config = reward_model_config(folder, num_updates=2, **{"model.d_model": 8, "eval.every": 0})
    reward_model.train(build.reward_model_plan(config), folder / "judge")
    return folder / "judge"


@pytest.mark.slow
def test_a_critic_begins_with_the_body_of_another_policy(folder, plain):
    # Catches the policy's own weights taken all the same, another step than the last.
    state = first_state(rl_config(folder, **ON | {"critic.init_from": str(plain)}))
    trained = state_of(rl_config(folder), plain)[1].params
    body = state.critic.params["body"]
    assert_bit_equal(body, {name: trained[name] for name in body})
    assert (trained["embedding"] != state.params["embedding"]).any() and not np.any(state.critic.params["value"])


@pytest.mark.slow
def test_a_critic_begins_with_a_reward_model_of_another_size_and_goes_on_when_that_is_gone(folder, judge, tmp_path):
    # Catches a last layer of zeros, a spec of the policy; and a run that cannot go on without what it began with.
    config = rl_config(folder, **ON | {"critic.init_from": str(judge), "critic.learning_rate": 1e-3})
    state = first_state(config)
    assert_bit_equal(state.critic.params, restore_params(judge, state.critic.params)[1])
    assert np.any(state.critic.params["value"])
    assert state.critic.params["body"]["embedding"].shape[1] == 8 != state.params["embedding"].shape[1]
    run = train_logged(config, tmp_path / "run")
    elsewhere = rl_config(folder, **ON | {"critic.init_from": str(tmp_path / "gone"), "num_rollouts": 3})
    with pytest.raises(UserError, match=r"critic\.init_from=.*gone'?: no such folder"):
        build.rl_plan(elsewhere)
    rl.train(build.rl_plan(elsewhere, str(run)), run, allow_changed_config=True)
    assert len(read_jsonl(run / "metrics.jsonl")) == 4


@pytest.mark.slow
def test_a_critic_of_another_tokenizer_is_refused_in_one_line(folder, judge, tmp_path):
    # Catches values of other texts than those that the policy wrote: all shapes may fit.
    config = rl_config(folder, **ON | {"critic.init_from": str(judge), "tokenizer": "chars:10 ="})
    with pytest.raises(UserError, match=r"^critic\.init_from=.*judge: tokenizer=.* were trained with another one"):
        rl.train(build.rl_plan(config), tmp_path / "run")


# ---------------------------------------------------------------------------- how it is trained


def test_the_optimizer_of_the_critic_is_that_of_the_policy_but_for_what_is_its_own(folder, monkeypatch):
    # Catches a field that goes to the policy or to nobody, None taken for no clipping, a schedule of the critic that
    # ends with the policy's updates, or one of the policy that counts updates which it does not make.
    made, make = [], steps.optimizer_of
    monkeypatch.setattr(steps, "optimizer_of", lambda plan: (made.append(plan), make(plan))[1])
    changes = {"num_rollouts": 5, "critic.warmup_rollouts": 2, "num_iterations": 3, "optimizer.schedule": "cosine"}
    own = {"learning_rate": 0.5, "warmup_steps": 7, "weight_decay": 0.25, "max_grad_norm": 3.0}
    for fields in (own, {"learning_rate": 0.5}):
        made.clear()
        config = rl_config(folder, **ON | changes | {f"critic.{name}": value for name, value in fields.items()})
        rl.prepare(build.rl_plan(config))
        policy, critic = made
        assert policy.fields == config.optimizer.to_dict() and critic.fields == policy.fields | fields
        assert (policy.total_steps, critic.total_steps) == (3 * 2 * 3, 5 * 2 * 3)


def test_a_warm_up_updates_the_critic_alone_and_takes_the_metrics_of_the_policy():
    # Catches a policy that moves all the same, and metrics that are left out, on which the guard of the loop looks.
    parts = SimpleNamespace(
        minibatches=lambda batch: (1, 2),
        train_step=lambda state, part: pytest.fail("the policy was updated"),
        measure=lambda state, part: {"loss": part},
        critic_step=lambda critic, part: (critic + part, {"critic/loss": critic}),
    )
    state = SimpleNamespace(stale_params=(), critic=10)
    state.replace = lambda critic: SimpleNamespace(stale_params=(), critic=critic, replace=state.replace)
    state, done = rl.update(parts, state, "rollout", critic_only=True)
    assert state.critic == 13
    assert done == [{"loss": 1, "critic/loss": 10}, {"loss": 2, "critic/loss": 11}]


@pytest.mark.parametrize(
    ("poisoned", "message"),
    [
        (["critic/loss"], "gradient of the critic is not finite; step 1 is good; lower critic.learning_rate"),
        (["critic/grad_norm"], "gradient of the critic is not finite; step 1 is good; lower critic.learning_rate"),
        (["loss"], "gradient is not finite; step 1 is good; lower optimizer.learning_rate"),
        (["loss", "critic/loss"], "gradient of the critic is not finite; step 1 is good; lower critic.learning_rate"),
    ],
)
def test_a_critic_that_diverges_stops_the_run_and_its_own_learning_rate_is_named(poisoned, message):
    # Catches a critic of NaN that is trained to the end of the run, and the policy's learning rate blamed for it: the
    # values of such a critic make the advantages, and so the policy's loss, NaN as well.
    names = ("loss", "grad_norm", "critic/loss", "critic/grad_norm")
    good = {name: masked.over_updates(np.float32(1)) for name in names}
    bad = good | {name: masked.over_updates(np.float32(np.nan)) for name in poisoned}
    checkpointer = SimpleNamespace(last_good=lambda: "; step 1 is good")
    with pytest.raises(Diverged, match=f"^rollout 3, update 1: loss or {message}$"):
        rl.guard(None, 3, [good, bad], None, checkpointer)


@pytest.mark.parametrize("warmup", [-1, 2, 3])
def test_a_warm_up_leaves_rollouts_to_the_policy(folder, warmup):
    # Catches a run in which nothing is learned, unsaid.
    with pytest.raises(UserError, match=rf"^critic\.warmup_rollouts={warmup}: must leave some of the 2 rollouts"):
        build.rl_plan(rl_config(folder, **ON | {"critic.warmup_rollouts": warmup}))


@pytest.mark.slow
def test_with_all_four_models_a_run_goes_on_bit_equal_across_the_end_of_the_warm_up(folder, judge, tmp_path):
    # Catches a policy, an optimizer or a count of steps that moves in the warm-up; a critic, a reference or a reward
    # model that is lost, or begun anew, where a run goes on.
    config = rl_config(folder, **ON | {
        "num_rollouts": 4, "critic.init_from": str(judge), "critic.warmup_rollouts": 2, "reward_kl_coef": 0.1,
        "sync_ref_model": True, "ref_model_sync_steps": 3, "checkpoint.keep_last": 9, "optimizer.schedule": "cosine",
        "rewards": ("numeric_answer", f"reward_model:{judge}"), "optimizer.learning_rate": 0.01,
    })  # fmt: skip
    whole = train_logged(config, tmp_path / "whole")
    first = first_state(config)
    _, last = state_of(config, whole)
    assert (int(last.step), int(last.critic.step)) == (2 * 2, 4 * 2)
    lines = read_jsonl(whole / "metrics.jsonl")
    assert [line["learning_rate"] > 0 for line in lines[:4]] == [False, False, True, True]
    assert all("critic/loss" in line and "entropy" in line for line in lines[:4])
    for kept in (1, 2, 3):
        part = shutil.copytree(whole, tmp_path / str(kept))
        for step in range(kept + 1, 5):
            shutil.rmtree(part / "checkpoints" / str(step))
        _, state = state_of(config, part)
        if kept < 3:
            assert_bit_equal((state.step, state.params, state.opt_state), (first.step, first.params, first.opt_state))
            assert (state.critic.params["value"] != first.critic.params["value"]).any()
        train_logged(config, part)
        for name in RESULTS:
            assert (part / name).read_bytes() == (whole / name).read_bytes(), name
        assert_bit_equal(state_of(config, part)[1], last)


@pytest.mark.slow
def test_ppo_with_a_critic_learns_the_digits(folder, tmp_path):
    # Catches advantages of the wrong sign, values of other rows, a critic that is never fitted.
    config = rl_config(folder, **{
        "objective.preset": "ppo", "critic.enable": True, "critic.warmup_rollouts": 2, "critic.learning_rate": 2e-3,
        "num_rollouts": 40, "num_prompts": 8, "num_generations": 8, "optimizer.learning_rate": 0.01, "eval.every": 0,
        "checkpoint.every": 0, "eval.num_prompts": 14, "model.moe_backend": "blocked",
    })  # fmt: skip
    rl.train(build.rl_plan(config), tmp_path)
    lines = read_jsonl(tmp_path / "metrics.jsonl")[:40]
    start, end = (np.mean([line["reward/mean"] for line in part]) for part in (lines[:4], lines[-4:]))
    assert end > start + 0.3 and end > 0.65
    # Not the explained variance, whose mean is ruled by minibatches in which nearly all rewards are equal.
    expected, got = (np.mean([line[name] for line in lines[-8:]]) for name in ("critic/value_mean", "reward/mean"))
    assert expected == pytest.approx(got, abs=0.1)
