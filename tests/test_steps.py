"""Plans -> the parts of a run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspo import build, plans, rl
from gspo.data.example import Example
from gspo.data.scoring import make_scorer
from gspo.generate import prompt_source
from gspo.parallel import distributed
from gspo.steps import check_rows, make_layout, objective_of, optimizer_of
from gspo.types import UserError
from tests.tiny_runs import assert_bit_equal, kept_compiles, parts_of, rl_config  # noqa: F401 - a fixture


def test_an_adaptive_entropy_bonus_takes_the_place_of_the_fixed_one(tmp_path):
    # Catches the bonus counted twice.
    changes = {"objective.entropy_coef": 0.25}
    fixed = objective_of(build.rl_plan(rl_config(tmp_path, **changes)))
    plan = build.rl_plan(rl_config(tmp_path, entropy_target=1.0, **changes))
    adaptive = objective_of(plan)
    assert "entropy_BC" in fixed.needs and "entropy_BC" not in adaptive.needs
    assert plan.objective["entropy_coef"] == 0.25
    steps = rl.prepare(plan).steps
    assert float(steps.start.init(jax.random.key(0)).entropy_coef) == 0.25


def test_rewards_come_in_the_order_of_the_config_and_task_means_the_tasks_own(tmp_path):
    # Catches weights that meet the wrong reward.
    config = rl_config(tmp_path, rewards=("format_hash", "task"), reward_weights=(0.1, 1.0))
    plan, tokenizer, _, _ = parts_of(config)
    source = prompt_source(plan.data, "train", tokenizer)
    scorer = make_scorer(plan.experience.rewards, source.task, plan.experience.reward_weights)
    examples = [Example("", "#### 7")] * 2  # an exact match has both
    scores = scorer(["#### 7", "#### 8"], examples)
    assert scorer.names == ["format_hash", "task"] and scores.parts_BR.tolist() == [[1, 1], [1, 0]]
    np.testing.assert_allclose(scores.rewards_B, [1.1, 0.1])


def test_the_learning_rate_that_is_logged_is_the_one_that_is_used(tmp_path):
    # Catches a schedule for the log and another for the optimizer.
    config = rl_config(tmp_path, **{
        "optimizer.schedule": "linear", "optimizer.warmup_steps": 2, "optimizer.learning_rate": 0.1,
        "optimizer.eps": 1e-30,
    })  # fmt: skip
    optimizer, learning_rate = optimizer_of(plans.OptimizerPlan(config.optimizer.to_dict(), 6))
    params = {"w": jnp.ones(3)}
    state = optimizer.init(params)
    for step in range(6):
        updates, state = optimizer.update({"w": jnp.ones(3)}, state, params)
        np.testing.assert_allclose(-updates["w"], learning_rate(step), rtol=1e-5)  # Adam's step on a constant gradient
    rates = [float(learning_rate(step)) for step in range(7)]
    np.testing.assert_allclose(rates, [0.05, 0.1, 0.1, 0.075, 0.05, 0.025, 0.0], rtol=1e-6)


def test_rows_lie_along_all_axes_but_tensor(tmp_path):
    # Catches devices that all compute the same rows.
    layout = make_layout(build.mesh_plan(rl_config(tmp_path, **{"mesh.data": 2, "mesh.expert": 2, "mesh.tensor": 2})))
    rows, lengths = distributed.put_rows(layout.sharding("rows"), np.arange(8), 8, np.zeros((8, 3)), np.arange(8))
    assert {shard.data.shape for shard in rows.addressable_shards} == {(2, 3)} and len(rows.addressable_shards) == 8
    assert sorted({tuple(shard.data.tolist()) for shard in lengths.addressable_shards}) == [
        (0, 1),
        (2, 3),
        (4, 5),
        (6, 7),
    ]
    check_rows(layout, batch_size=8)
    with pytest.raises(UserError, match="batch_size=6: not divisible by the 4 devices that share the rows"):
        check_rows(layout, batch_size=6)


def test_a_smaller_mesh_than_there_are_devices_takes_the_first_ones(tmp_path):
    # Catches a laptop with several devices that cannot run what one device can.
    assert (
        make_layout(build.mesh_plan(rl_config(tmp_path, **{"mesh.data": 2}))).mesh.devices.reshape(-1).tolist()
        == jax.devices()[:2]
    )


def test_the_vocabulary_is_the_tokenizers_unless_a_larger_one_is_asked_for(tmp_path):
    # Catches logits for ids that the tokenizer cannot decode, and embeddings too few for its ids.
    def vocab_size(**changes):
        config = rl_config(tmp_path, **changes)
        return parts_of(config)[3].spec.vocab_size

    assert vocab_size() == 6 and vocab_size(tokenizer="bytes") == 258 and vocab_size(**{"model.vocab_size": 16}) == 16
    with pytest.raises(UserError, match=r"model\.vocab_size=5: the tokenizer has 6 ids"):
        vocab_size(**{"model.vocab_size": 5})


@pytest.mark.parametrize("name", ["gspo", "rspo"])
def test_the_old_policy_is_remembered_by_all_that_the_objective_compares_with(tmp_path, name):
    # Catches an objective on the routers whose rollouts do not keep what the old ones said: it would stop at its first
    # update, after the first rollout was paid for. And the memory of it where nothing reads it.
    steps = rl.prepare(build.rl_plan(rl_config(tmp_path, **{"objective.preset": name}))).steps
    tokens, lengths = jax.ShapeDtypeStruct((16, 10), jnp.int32), jax.ShapeDtypeStruct((16,), jnp.int32)
    kept = jax.eval_shape(steps.scorer, steps.abstract.params, tokens, lengths)
    assert kept.logp_BC.shape == (16, 6)
    assert ("old_router_logp_LBCX" in steps.objective.needs) == (name == "rspo")
    assert (kept.router_logp_LBCX is not None) == (name == "rspo")
