"""Config -> parts: that each part is what the config says, and that the state on the mesh is what its description
says."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspo import build, rl
from gspo.data.rewards import exact_match, format_hash
from gspo.learning.critic import Critic
from gspo.learning.optim import make_optimizer
from gspo.parallel import distributed
from gspo.run.checkpoint import Checkpointer
from gspo.types import UserError
from tests.tiny_runs import assert_bit_equal, kept_compiles, rl_config  # noqa: F401 - a fixture


def parts_of(config):
    """layout, model, optimizer"""
    optimizer, _ = build.optimizer(config, total_steps=10)
    return build.layout(config), build.model(config, build.tokenizer(config)), optimizer


# ---------------------------------------------------------------------------------------------------- the state


def test_the_initial_state_is_what_its_abstract_twin_says(tmp_path):
    # Catches a checkpoint restored into other shapes, dtypes or places than those of the run, and a part of the state
    # without a description, which a resume would lose.
    layout, model, optimizer = parts_of(rl_config(tmp_path, **{"mesh.data": 2, "mesh.fsdp": 2, "mesh.expert": 2}))
    made = build.state_on_mesh(layout, model, optimizer, with_ref=True, entropy_coef=0.5)
    init, abstract = build.add_critic(layout, Critic(model.spec), make_optimizer(learning_rate=1e-3), *made)
    state = init(jax.random.key(0))
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    for (path, leaf), twin in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(abstract), strict=True):
        assert (leaf.shape, leaf.dtype) == (twin.shape, twin.dtype), path
        assert leaf.sharding.is_equivalent_to(twin.sharding, leaf.ndim), path
    assert float(state.entropy_coef) == 0.5 and state.critic.ref_params is None


def test_the_moments_of_the_optimizer_lie_where_their_parameters_lie(tmp_path):
    # Catches an optimizer that holds its state whole on every device, twice the size of the model.
    layout, model, optimizer = parts_of(rl_config(tmp_path, **{"mesh.data": 2, "mesh.fsdp": 2, "mesh.expert": 2}))
    _, abstract = build.state_on_mesh(layout, model, optimizer)
    specs = {leaf.sharding.spec for leaf in jax.tree.leaves(abstract.params)}
    assert any("expert" in str(spec) for spec in specs) and any("fsdp" in str(spec) for spec in specs)
    (adam,) = [part for part in abstract.opt_state if hasattr(part, "mu")]
    for moment in (adam.mu, adam.nu):
        assert jax.tree.map(lambda x: x.sharding, moment) == jax.tree.map(lambda x: x.sharding, abstract.params)


def test_the_seed_decides_the_initial_parameters_and_the_mesh_does_not(tmp_path):
    # Catches every seed starting from the same weights, and another start on another number of devices.
    states = {}
    for name, changes in {"a": {}, "b": {"seed": 1}, "c": {"mesh.data": 2, "mesh.fsdp": 2, "mesh.expert": 2}}.items():
        config = rl_config(tmp_path, **changes)
        states[name] = build.initial_state(config, *build.state_on_mesh(*parts_of(config)))
    assert_bit_equal(states["a"].params, states["c"].params)
    assert (states["a"].params["embedding"] != states["b"].params["embedding"]).all()


def test_init_from_gives_policy_reference_and_critic_the_same_parameters_in_buffers_of_their_own(tmp_path):
    # Catches a reference whose buffers the first update donates away, and a critic that starts from noise.
    config = rl_config(tmp_path, init_from=str(tmp_path / "cold"))
    layout, model, optimizer = parts_of(config)
    made = build.state_on_mesh(layout, model, optimizer, with_ref=True)
    cold = made[0](jax.random.key(99)).replace(step=jnp.int32(7))
    with Checkpointer(tmp_path / "cold") as checkpointer:
        checkpointer.save(7, cold, {})
    state = build.initial_state(config, *build.add_critic(layout, Critic(model.spec), optimizer, *made))
    assert_bit_equal(state.params, cold.params)
    assert_bit_equal(state.ref_params, cold.params)
    assert int(state.step) == 0
    body = state.critic.params["body"]
    assert_bit_equal(body, {name: state.params[name] for name in body})
    want = jax.tree.map(np.array, state.params)
    jax.tree.map(lambda leaf: leaf.delete(), state.params)
    assert_bit_equal(state.ref_params, want)
    assert_bit_equal(body, {name: want[name] for name in body})


@pytest.mark.parametrize("experts", [4, 0])
def test_the_log_counts_all_parameters_and_those_that_run(tmp_path, experts):
    # Catches embeddings left out, or routers and attention counted among the experts.
    changes = {"model.num_experts": experts, "model.d_ff": 24, "model.num_layers": 3, "model.experts_per_token": 3}
    layout, model, optimizer = parts_of(rl_config(tmp_path, **changes))
    text = build.describe(model, build.state_on_mesh(layout, model, optimizer)[1])
    total = sum(leaf.size for leaf in jax.tree.leaves(nn.unbox(jax.eval_shape(model.init_params, jax.random.key(0)))))
    idle = 3 * (experts - 3) * 3 * 16 * 8  # layers x experts that do not run x matrices x D x F
    if experts:
        assert text == f"MoE model, 3 layers, 4 experts of which 3 run, {total:,} parameters, {total - idle:,} active"
    else:
        assert text == f"dense model, 3 layers, {total:,} parameters"


# ---------------------------------------------------------------------------------------------------- the other parts


def test_fields_of_the_objective_are_laid_over_the_preset_and_none_leaves_it_alone(tmp_path):
    # Catches a preset that wins over the user's field, and None taken for a value.
    _, settings = build.objective(rl_config(tmp_path, **{"objective.preset": "grpo", "objective.epsilon": 0.1}))
    assert (settings["importance_sampling_level"], settings["epsilon"], settings["epsilon_high"]) == (
        "token",
        0.1,
        0.27,
    )
    _, settings = build.objective(rl_config(tmp_path))
    assert (settings["importance_sampling_level"], settings["epsilon"], settings["epsilon_high"]) == (
        "sequence",
        3e-4,
        4e-4,
    )


def test_an_adaptive_entropy_bonus_takes_the_place_of_the_fixed_one(tmp_path):
    # Catches the bonus counted twice.
    changes = {"objective.entropy_coef": 0.25}
    fixed, _ = build.objective(rl_config(tmp_path, **changes))
    adaptive, settings = build.objective(rl_config(tmp_path, entropy_target=1.0, **changes))
    assert "entropy_BC" in fixed.needs and "entropy_BC" not in adaptive.needs
    assert settings["entropy_coef"] == 0.25
    steps = rl.prepare(rl_config(tmp_path, entropy_target=1.0, **changes)).steps
    assert float(steps.init(jax.random.key(0)).entropy_coef) == 0.25


def test_rewards_come_in_the_order_of_the_config_and_task_means_the_tasks_own(tmp_path):
    # Catches weights that meet the wrong reward.
    config = rl_config(tmp_path, rewards=("format_hash", "task"), reward_weights=(0.1, 1.0))
    source = build.prompt_source(config, "train", build.tokenizer(config))
    assert list(build.reward_functions(config, source).items()) == [("format_hash", format_hash), ("task", exact_match)]


def test_the_learning_rate_that_is_logged_is_the_one_that_is_used(tmp_path):
    # Catches a schedule for the log and another for the optimizer.
    config = rl_config(tmp_path, **{"optimizer.schedule": "linear", "optimizer.warmup_steps": 2, "optimizer.learning_rate": 0.1,
                                    "optimizer.eps": 1e-30})  # fmt: skip
    optimizer, learning_rate = build.optimizer(config, total_steps=6)
    params = {"w": jnp.ones(3)}
    state = optimizer.init(params)
    for step in range(6):
        updates, state = optimizer.update({"w": jnp.ones(3)}, state, params)
        np.testing.assert_allclose(-updates["w"], learning_rate(step), rtol=1e-5)  # Adam's step on a constant gradient
    rates = [float(learning_rate(step)) for step in range(7)]
    np.testing.assert_allclose(rates, [0.05, 0.1, 0.1, 0.075, 0.05, 0.025, 0.0], rtol=1e-6)


def test_rows_lie_along_all_axes_but_tensor(tmp_path):
    # Catches devices that all compute the same rows.
    layout = build.layout(rl_config(tmp_path, **{"mesh.data": 2, "mesh.expert": 2, "mesh.tensor": 2}))
    rows, lengths = distributed.put_rows(layout.sharding("rows"), np.arange(8), 8, np.zeros((8, 3)), np.arange(8))
    assert {shard.data.shape for shard in rows.addressable_shards} == {(2, 3)} and len(rows.addressable_shards) == 8
    assert sorted({tuple(shard.data.tolist()) for shard in lengths.addressable_shards}) == [
        (0, 1),
        (2, 3),
        (4, 5),
        (6, 7),
    ]
    build.check_rows(layout, batch_size=8)
    with pytest.raises(UserError, match="batch_size=6: not divisible by the 4 devices that share the rows"):
        build.check_rows(layout, batch_size=6)


def test_a_smaller_mesh_than_there_are_devices_takes_the_first_ones(tmp_path):
    # Catches a laptop with several devices that cannot run what one device can.
    assert build.layout(rl_config(tmp_path, **{"mesh.data": 2})).mesh.devices.reshape(-1).tolist() == jax.devices()[:2]


def test_the_vocabulary_is_the_tokenizers_unless_a_larger_one_is_asked_for(tmp_path):
    # Catches logits for ids that the tokenizer cannot decode, and embeddings too few for its ids.
    def vocab_size(**changes):
        config = rl_config(tmp_path, **changes)
        return build.model(config, build.tokenizer(config)).spec.vocab_size

    assert vocab_size() == 6 and vocab_size(tokenizer="bytes") == 258 and vocab_size(**{"model.vocab_size": 16}) == 16
    with pytest.raises(UserError, match=r"model\.vocab_size=5: the tokenizer has 6 ids"):
        vocab_size(**{"model.vocab_size": 5})


@pytest.mark.parametrize("value", [0, -1])
def test_a_number_that_must_be_positive_is_named_with_its_section(tmp_path, value):
    # Catches eval.num_prompts reported as num_prompts.
    config = rl_config(tmp_path, **{"eval.num_prompts": value})
    build.positive(config, "num_prompts")
    with pytest.raises(UserError, match=f"^eval.num_prompts={value}: must be positive"):
        build.positive(config, "num_prompts", "eval.num_prompts")
