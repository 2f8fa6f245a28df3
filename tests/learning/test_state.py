"""Config -> parts: that each part is what the config says, and that the state on the mesh is what its description
says."""

import gc

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspo import build, steps
from gspo.critic_source import first_params
from gspo.learning.critic import Critic, CriticPlan
from gspo.learning.optim import make_optimizer
from gspo.learning.state import add_critic, state_on_mesh
from gspo.run.checkpoint import Checkpointer, restore_params
from gspo.steps import describe, initial_state, optimizer_of
from tests.tiny_runs import assert_bit_equal, kept_compiles, parts_of, rl_config  # noqa: F401 - a fixture


def parts(config):
    """layout, model, optimizer"""
    plan, _, layout, model = parts_of(config)
    return layout, model, optimizer_of(plan.optimizer)[0]


# ---------------------------------------------------------------------------------------------------- the state


def test_the_initial_state_is_what_its_abstract_twin_says(tmp_path):
    # Catches a checkpoint restored into other shapes, dtypes or places than those of the run, and a part of the state
    # without a description, which a resume would lose.
    layout, model, optimizer = parts(rl_config(tmp_path, **{"mesh.data": 2, "mesh.fsdp": 2, "mesh.expert": 2}))
    made = state_on_mesh(layout, model, optimizer, with_ref=True, entropy_coef=0.5)
    start = add_critic(layout, Critic(model.spec), make_optimizer(learning_rate=1e-3), made)
    state, abstract = start.init(jax.random.key(0)), start.abstract
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    for (path, leaf), twin in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(abstract), strict=True):
        assert (leaf.shape, leaf.dtype) == (twin.shape, twin.dtype), path
        assert leaf.sharding.is_equivalent_to(twin.sharding, leaf.ndim), path
    assert float(state.entropy_coef) == 0.5 and state.critic.ref_params is None


def test_the_moments_of_the_optimizer_lie_where_their_parameters_lie(tmp_path):
    # Catches an optimizer that holds its state whole on every device, twice the size of the model.
    layout, model, optimizer = parts(rl_config(tmp_path, **{"mesh.data": 2, "mesh.fsdp": 2, "mesh.expert": 2}))
    abstract = state_on_mesh(layout, model, optimizer).abstract
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
        states[name] = initial_state(build.rl_plan(config), state_on_mesh(*parts(config)))
    assert_bit_equal(states["a"].params, states["c"].params)
    assert (states["a"].params["embedding"] != states["b"].params["embedding"]).all()


def test_init_from_gives_policy_reference_and_critic_the_same_parameters_in_buffers_of_their_own(tmp_path):
    # Catches a reference whose buffers the first update donates away, and a critic that starts from noise.
    config = rl_config(tmp_path, init_from=str(tmp_path / "cold"))
    layout, model, optimizer = parts(config)
    made = state_on_mesh(layout, model, optimizer, with_ref=True)
    cold = made.init(jax.random.key(99)).replace(step=jnp.int32(7))
    with Checkpointer(tmp_path / "cold") as checkpointer:
        checkpointer.save(7, cold, {})
    critic = Critic(model.spec, layout)
    first = first_params(CriticPlan(1.0, 1.0, 1.0, 1.0), critic, None)
    state = initial_state(build.rl_plan(config), add_critic(layout, critic, optimizer, made, first))
    assert_bit_equal(state.params, cold.params)
    assert_bit_equal(state.ref_params, cold.params)
    assert int(state.step) == 0
    body = state.critic.params["body"]
    assert_bit_equal(body, {name: state.params[name] for name in body})
    want = jax.tree.map(np.array, state.params)
    jax.tree.map(lambda leaf: leaf.delete(), state.params)
    assert_bit_equal(state.ref_params, want)
    assert_bit_equal(body, {name: want[name] for name in body})


def test_init_from_makes_no_second_copy_of_the_weights(tmp_path, monkeypatch):
    # Catches random parameters that are made, kept beside those that are read, and thrown away.
    config = rl_config(tmp_path, init_from=str(tmp_path / "cold"))
    layout, model, optimizer = parts(config)
    start = state_on_mesh(layout, model, optimizer)
    with Checkpointer(tmp_path / "cold") as checkpointer:
        checkpointer.save(7, start.init(jax.random.key(99)), {})
    read, alive = [], []

    def reading(*args):
        alive.append(sum(leaf.nbytes for leaf in jax.live_arrays()))
        read.append(restore_params(*args)[1])
        return 7, read[0]

    monkeypatch.setattr(steps, "restore_params", reading)
    gc.collect()
    before = sum(leaf.nbytes for leaf in jax.live_arrays())
    state = initial_state(build.rl_plan(config), start)
    assert alive == [before]  # nothing was there when they were read
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(read[0]))  # and the state has taken them over
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("experts", [4, 0])
def test_the_log_counts_all_parameters_and_those_that_run(tmp_path, experts):
    # Catches embeddings left out, or routers, attention, biases and shared experts counted among the experts.
    changes = {"model.num_experts": experts, "model.d_ff": 24, "model.num_layers": 3, "model.experts_per_token": 3}
    changes |= {"model.dense_layers": (1,), "model.d_shared": 8, "model.shared_gate": True, "model.qkv_bias": True}
    layout, model, optimizer = parts(rl_config(tmp_path, **changes))
    text = describe(model, state_on_mesh(layout, model, optimizer).abstract)
    total = sum(leaf.size for leaf in jax.tree.leaves(nn.unbox(jax.eval_shape(model.init_params, jax.random.key(0)))))
    idle = 2 * (experts - 3) * 3 * 16 * 8  # layers x experts that do not run x matrices x D x F
    if experts:
        size = f"{total:,} parameters, {total - idle:,} active"
        assert text == f"MoE model, 3 layers of which 1 dense, 4 experts of which 3 run, {size}"
    else:
        assert text == f"dense model, 3 layers, {total:,} parameters"
