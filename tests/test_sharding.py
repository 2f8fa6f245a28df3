"""Meshes and rules; and that eight devices compute what one does, however they are arranged."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from gspo.learner import make_train_step
from gspo.model.distribution import Sampling
from gspo.model.transformer import ModelSpec, Transformer
from gspo.objectives import preset
from gspo.sampler import make_sampler
from gspo.sharding import MESH_AXES, RULES, make_mesh, named_sharding, partition_spec, tree_shardings
from gspo.types import Batch, TrainState, UserError
from tests import model_oracle as oracle
from tests.model_oracle import quick_compiles  # noqa: F401 - a fixture

DENSE = ModelSpec(vocab_size=16, num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, head_width=4, d_ff=16, rope_theta=100.0)
MOE = ModelSpec(
    vocab_size=16, num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, head_width=4, rope_theta=100.0,
    num_experts=8, experts_per_token=2, d_expert=8,
)  # fmt: skip
MESHES = {
    "data8": {"data": 8},
    "fsdp8": {"fsdp": 8},
    "expert8": {"expert": 8},
    "data2-expert4": {"data": 2, "expert": 4},
    "fsdp2-expert2-tensor2": {"fsdp": 2, "expert": 2, "tensor": 2},
}
Q, G, P, C = 8, 2, 4, 5
B, T = Q * G, P + C
OPTIMIZER = optax.chain(oracle.record_gradients(), optax.sgd(0.1))

needs_eight = pytest.mark.skipif(jax.device_count() < 8, reason="eight devices, real or virtual")


# ---------------------------------------------------------------- meshes and rules


@needs_eight
def test_one_axis_of_a_mesh_may_take_the_rest():
    # Catches -1 that counts all devices instead of what the other axes leave.
    assert dict(make_mesh({"fsdp": 2, "expert": -1}).shape) == {"data": 1, "fsdp": 2, "expert": 4, "tensor": 1}
    assert dict(make_mesh({"data": 2, "expert": 4}).shape) == {"data": 2, "fsdp": 1, "expert": 4, "tensor": 1}


@needs_eight
@pytest.mark.parametrize(
    "sizes", [{"data": 16}, {"data": 3, "expert": -1}, {"data": -1, "fsdp": -1}, {"data": 0}, {"tensor": -2}], ids=str
)
def test_a_mesh_that_the_devices_cannot_fill_is_a_one_line_error(sizes):
    # Catches an assertion from inside jax, which names neither the field nor how many devices there are.
    with pytest.raises(UserError, match="mesh") as error:
        make_mesh(sizes)
    assert "\n" not in str(error.value)


def test_mesh_axes_are_auto_so_that_the_partitioner_places_what_is_not_named():
    # Catches the default of recent versions, Explicit, under which ordinary jnp code raises.
    mesh = make_mesh({}, jax.devices()[:1])
    assert mesh.axis_names == MESH_AXES and set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def test_two_axes_of_an_array_cannot_claim_the_same_mesh_axis():
    # Catches a rules table under which one axis silently wins and the other is replicated.
    with pytest.raises(ValueError, match=r"'rows' and 'embed'.*'fsdp'"):
        partition_spec(("rows", "embed"))
    with pytest.raises(ValueError, match="tensor"):
        partition_spec(("heads", "mlp"))


def test_logical_names_become_mesh_axes():
    # Catches a rule that is looked up for the wrong axis of the array.
    assert partition_spec(("layers", "expert", "embed", "mlp")) == PartitionSpec(None, "expert", "fsdp", "tensor")
    assert partition_spec(("rows", None)) == PartitionSpec(("data", "fsdp", "expert"), None)
    assert all(axis in MESH_AXES for axes in RULES.values() for axis in axes)


@needs_eight
def test_an_axis_that_the_devices_do_not_divide_is_named_with_its_size():
    # Catches padding or replication behind the user's back, and an error without the parameter's name.
    five_experts, eight_experts = (jax.eval_shape(Transformer(spec).init_params, jax.random.key(0)) for spec in (oracle.MOE, MOE))
    mesh = make_mesh({"expert": -1})
    with pytest.raises(UserError, match=r"'expert'.*moe.*5 entries.*8 devices") as error:
        tree_shardings(mesh, five_experts)
    assert "\n" not in str(error.value)
    assert tree_shardings(mesh, eight_experts)["blocks"]["moe"]["gate"].spec == PartitionSpec(None, "expert", "fsdp", "tensor")


# ---------------------------------------------------------------- eight devices against one


def batch_of(spec, recorded):
    """16 rows of random tokens; old log-probs near those of a uniform policy; routes to replay, or -1 throughout."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, C + 1, B).astype(np.int32)
    mask_BC = np.arange(C) < lengths[:, None]
    routes = None
    if spec.num_experts:
        routes = np.stack([rng.permutation(8)[:2] for _ in range(2 * B * T)]).reshape(2, B, T, 2).astype(np.int8)
        routes = routes if recorded else np.full_like(routes, -1)
    return Batch(
        tokens_BT=rng.integers(0, 16, (B, T)).astype(np.int32),
        prompt_lengths_B=rng.integers(1, P + 1, B).astype(np.int32),
        completion_lengths_B=lengths,
        loss_mask_BC=mask_BC,
        advantages_BC=np.where(mask_BC, rng.standard_normal((B, 1)), 0).astype(np.float32),
        old_logp_BC=rng.normal(-2.8, 0.3, (B, C)).astype(np.float32),
        routes_LBTX=routes,
    )


def place(mesh, batch):
    """Rows over the devices: axis 0, in routes axis 1."""
    def one(name, x):
        axes = (None, "rows") if name == "routes_LBTX" else ("rows",)
        return None if x is None else jax.device_put(x, named_sharding(mesh, *axes))

    return Batch(**{name: one(name, x) for name, x in vars(batch).items()})


@functools.cache
def greedy_sampler(spec):
    return make_sampler(
        Transformer(spec), num_generations=G, max_completion_length=C, eos_ids=(1,), pad_id=0, sampling=Sampling(temperature=0)
    )


def shardings_of(spec, mesh):
    """Where a training state lies: the recorded gradient, like the parameters, by the rules."""
    params = tree_shardings(mesh, jax.eval_shape(Transformer(spec).init_params, jax.random.key(0)))
    return TrainState(named_sharding(mesh), params, (params, *OPTIMIZER.init({})[1:]))


def results(spec, mesh):
    """{replay: (gradients, metrics)}, the greedy rollout, and the state after the steps, on this mesh."""
    shardings = shardings_of(spec, mesh)
    step = make_train_step(
        Transformer(spec), OPTIMIZER, preset("gspo", epsilon=0.3, epsilon_high=0.3), replay=bool(spec.num_experts),
        state_shardings=shardings,
    )  # fmt: skip
    params = oracle.build(spec)[1]
    rng = np.random.default_rng(1)
    prompts = rng.integers(0, 16, (Q, P)).astype(np.int32), rng.integers(1, P + 1, Q).astype(np.int32)
    prompts = jax.device_put(prompts, named_sharding(mesh, "rows"))
    rollout = jax.device_get(greedy_sampler(spec)(jax.device_put(params, shardings.params), *prompts, jax.random.key(0)))
    found = {}
    for recorded in (False, True) if spec.num_experts else (False,):
        own = jax.tree.map(jnp.copy, params)  # a step donates what it is given
        zeros = jax.tree.map(jnp.zeros_like, params)
        state = jax.device_put(TrainState(jnp.int32(0), own, (zeros, *OPTIMIZER.init({})[1:])), shardings)
        state, metrics = step(state, place(mesh, batch_of(spec, recorded)))
        found[recorded] = jax.device_get((state.opt_state[0], metrics))
    return found, rollout, state


@functools.cache
def on_one_device(spec):
    return results(spec, make_mesh({}, jax.devices()[:1]))[:2]


@needs_eight
@pytest.mark.parametrize(
    ("spec", "mesh"),
    [
        pytest.param(spec, mesh, id=f"{name}-{mesh}", marks=() if (name, mesh) in KEPT else pytest.mark.slow)
        for KEPT in [(("moe", "fsdp8"), ("moe", "fsdp2-expert2-tensor2"))]
        for name, spec in (("dense", DENSE), ("moe", MOE))
        for mesh in MESHES
    ],
)
def test_every_mesh_gives_the_loss_gradients_and_greedy_tokens_of_one_device(spec, mesh):
    # Catches a reduction over the rows of one device only, experts that lose the tokens of other devices, routes cut along
    # another axis than tokens, a cache written by the wrong device; and parameters that come back from an update lying elsewhere.
    expected, expected_rollout = on_one_device(spec)
    mesh = make_mesh(MESHES[mesh])
    found, rollout, state = results(spec, mesh)
    for name in ("tokens_BT", "completion_lengths_B", "routes_LBTX"):
        np.testing.assert_array_equal(getattr(rollout, name), getattr(expected_rollout, name), err_msg=name)
    assert rollout.decode_steps == expected_rollout.decode_steps
    for recorded, (grads, metrics) in found.items():
        expected_grads, expected_metrics = expected[recorded]
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-6), grads, expected_grads)
        for name, value in metrics.items():
            np.testing.assert_allclose(value, expected_metrics[name], rtol=1e-4, atol=2e-5, err_msg=name)

    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(shardings_of(spec, mesh)), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    wide = state.params["blocks"]["moe"]["gate"] if spec.num_experts else state.params["blocks"]["mlp"]["gate"]
    parts = wide.size // wide.addressable_shards[0].data.size
    cutting = ("fsdp", "expert", "tensor") if spec.num_experts else ("fsdp", "tensor")
    assert parts == np.prod([mesh.shape[axis] for axis in cutting])
