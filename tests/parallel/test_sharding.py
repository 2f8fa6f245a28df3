"""Meshes and rules; and that eight devices compute what one does, however they are arranged."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from gspo.learning.learner import UpdatePlan, make_train_step
from gspo.learning.microbatch import shared_rows
from gspo.learning.sampler import make_sampler
from gspo.learning.state import state_on_mesh
from gspo.masked import values
from gspo.model.adapters import LoRA, merge_into
from gspo.model.distribution import Sampling
from gspo.model.spec import ModelSpec
from gspo.model.transformer import Transformer
from gspo.objectives import preset
from gspo.parallel.sharding import MESH_AXES, RULES, Layout, make_mesh, partition_spec, tree_shardings
from gspo.types import Batch, LossInputs, TrainState, UserError
from tests import model_oracle as oracle

DENSE = ModelSpec(
    vocab_size=16, num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, head_width=4, d_ff=16, rope_theta=100.0
)
MOE = ModelSpec(
    vocab_size=16, num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, head_width=4, rope_theta=100.0,
    num_experts=8, experts_per_token=2, d_expert=8,
)  # fmt: skip
# All that a block may have besides: dense layers, biases, a sigmoid router, a shared expert with its gate.
FULL = dataclasses.replace(
    MOE, num_layers=3, dense_layers=(0,), d_ff=16, router="sigmoid", routed_scale=2.5, d_shared=16, shared_gate=True,
    qkv_bias=True, out_bias=True,
)  # fmt: skip
LAYOUTS = {  # mesh sizes, rules, rules of rollouts, dispatch
    "data8": ({"data": 8}, "tensor", "tensor", "all_gather"),
    "fsdp8": ({"fsdp": 8}, "tensor", "tensor", "all_gather"),
    "expert8": ({"expert": 8}, "tensor", "tensor", "all_gather"),
    "data2-expert4": ({"data": 2, "expert": 4}, "tensor", "tensor", "all_gather"),
    "fsdp2-expert2-tensor2": ({"fsdp": 2, "expert": 2, "tensor": 2}, "tensor", "tensor", "all_gather"),
    "expert8-all-to-all": ({"expert": 8}, "tensor", "tensor", "all_to_all"),
    "data2-expert4-all-to-all": ({"data": 2, "expert": 4}, "expert_fsdp", "single", "all_to_all"),
    "fsdp2-expert2-tensor2-all-to-all": ({"fsdp": 2, "expert": 2, "tensor": 2}, "tensor", "tensor", "all_to_all"),
    "fsdp2-expert4-spread": ({"fsdp": 2, "expert": 4}, "expert_fsdp", "expert", "all_gather"),
    "fsdp2-expert4-spread-all-to-all": ({"fsdp": 2, "expert": 4}, "expert", "expert", "all_to_all"),
    "fsdp-rules": ({"fsdp": 4, "expert": 2}, "fsdp", "expert", "all_gather"),
}
KEPT = (MOE, "fsdp2-expert2-tensor2")  # the one that is not slow
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
        partition_spec(("rows", "embed"), RULES["tensor"])
    with pytest.raises(ValueError, match="tensor"):
        partition_spec(("heads", "mlp"), RULES["tensor"])


def test_logical_names_become_mesh_axes():
    # Catches a rule that is looked up for the wrong axis of the array.
    layout = Layout(make_mesh({}, jax.devices()[:1]))
    assert layout.spec("layers", "expert", "expert_embed", "mlp") == PartitionSpec(None, "expert", "fsdp", "tensor")
    assert layout.spec("rows", None) == PartitionSpec(("data", "fsdp", "expert"), None)
    assert all(axis in MESH_AXES for rules in RULES.values() for axes in rules.values() for axis in axes)


@pytest.mark.parametrize("rules", RULES)
def test_no_table_cuts_two_axes_of_a_parameter_along_one_mesh_axis(rules):
    # Catches a table that works for one family and collides on another's weights.
    layout = Layout(make_mesh({}, jax.devices()[:1]), rules)
    for spec in (MOE, DENSE, FULL):
        tree_shardings(layout, jax.eval_shape(Transformer(spec).init_params, jax.random.key(0)))


@needs_eight
def test_an_axis_that_the_devices_do_not_divide_is_named_with_its_size_and_the_choices():
    # Catches padding or replication behind the user's back, and an error without the parameter's name.
    five_experts, eight_experts = (
        jax.eval_shape(Transformer(spec).init_params, jax.random.key(0)) for spec in (oracle.MOE, MOE)
    )
    layout = Layout(make_mesh({"expert": -1}))
    with pytest.raises(
        UserError, match=r"mesh.expert=8: cannot cut axis 'expert'.*moe.*5 entries.*choose from 1, 5"
    ) as error:
        tree_shardings(layout, five_experts)
    assert "\n" not in str(error.value)
    assert tree_shardings(layout, eight_experts)["blocks"]["moe"]["gate"].spec == PartitionSpec(
        None, "expert", "fsdp", "tensor"
    )


@needs_eight
def test_rules_that_do_not_exist_or_leave_devices_idle_are_one_line_errors():
    # Catches a mesh axis along which every device computes the same, and a mistyped table found deep inside jit.
    mesh = make_mesh({"data": 4, "tensor": 2})
    with pytest.raises(
        UserError, match=r"mesh\.tensor=2: the rules 'expert_fsdp' cut nothing along it; use mesh_rules='tensor'"
    ):
        Layout(mesh, "expert_fsdp")
    with pytest.raises(UserError, match="mesh_rules='zero3': choose one of single, fsdp, expert, expert_fsdp, tensor"):
        Layout(mesh, "zero3")
    with pytest.raises(UserError, match="expert_dispatch='broadcast': choose one of all_gather, all_to_all"):
        Layout(mesh, dispatch="broadcast")


@needs_eight
def test_the_dimensions_of_an_array_say_how_it_lies():
    # Catches routes cut along their layers, and a scalar taken for a row.
    layout = Layout(make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
    rows = ("data", "fsdp", "expert")
    for dims, spec in {
        "BT": (rows, None), "LBTX": (None, rows, None, None), "QP": (rows, None), "": (),
        "LBSKH": (None, rows, None, "tensor", None), "LBTE": (None, rows, None, None),
    }.items():  # fmt: skip
        assert layout.of_dims(dims).spec == PartitionSpec(*spec), dims
    batch = layout.map_fields(lambda x, sharding: sharding.spec, batch_of(MOE, recorded=True))
    assert batch.old_routes_LBTX == PartitionSpec(None, rows, None, None) and batch.returns_BC is None
    assert batch.inputs.mask_BC == batch.tokens_BT == PartitionSpec(rows, None)


# ---------------------------------------------------------------- eight devices against one


def batch_of(spec, recorded):
    """16 rows of random tokens, two to a prompt; old log-probs near those of a uniform policy; routes to replay, or -1
    throughout."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, C + 1, B).astype(np.int32)
    mask_BC = np.arange(C) < lengths[:, None]
    routes = None
    if spec.num_experts:
        routes = np.stack([rng.permutation(8)[:2] for _ in range(2 * B * T)]).reshape(2, B, T, 2).astype(np.int8)
        routes[:, 1::G, :P] = routes[:, ::G, :P]
        routes = routes if recorded else np.full_like(routes, -1)
    tokens_BT = rng.integers(0, 16, (B, T)).astype(np.int32)
    tokens_BT[1::G, :P] = tokens_BT[::G, :P]
    return Batch(
        tokens_BT=tokens_BT,
        prompt_lengths_B=np.repeat(rng.integers(1, P + 1, Q), G).astype(np.int32),
        completion_lengths_B=lengths,
        inputs=LossInputs(
            logp_BC=None,
            mask_BC=mask_BC,
            advantages_BC=np.where(mask_BC, rng.standard_normal((B, 1)), 0).astype(np.float32),
            old_logp_BC=rng.normal(-2.8, 0.3, (B, C)).astype(np.float32),
        ),
        old_routes_LBTX=routes,
        replayed_routes_LBTX=routes,
    )


def place(layout, batch):
    """Rows over the devices: axis 0, in routes axis 1."""
    return layout.map_fields(jax.device_put, batch)


def shardings_of(spec, layout):
    """Where a training state lies: the recorded gradient, like the parameters, by the rules."""
    params = tree_shardings(layout, jax.eval_shape(Transformer(spec).init_params, jax.random.key(0)))
    return TrainState(layout.sharding(), params, (params, *OPTIMIZER.init({})[1:]))


def rollout_of(spec, layout, temperature):
    sampler = make_sampler(
        Transformer(spec, layout=layout), num_generations=G, max_completion_length=C, eos_ids=(1,), pad_id=0,
        sampling=Sampling(temperature=temperature),
    )  # fmt: skip
    rng = np.random.default_rng(1)
    prompts = rng.integers(0, 16, (Q, P)).astype(np.int32), rng.integers(1, P + 1, Q).astype(np.int32)
    params = jax.device_put(oracle.build(spec)[1], shardings_of(spec, layout).params)
    return jax.device_get(sampler(params, *jax.device_put(prompts, layout.sharding("rows")), jax.random.key(0)))


def updates_of(spec, layout, micro_batch_size=0):
    """{replay: (gradients, metrics)} and the state after the steps, on this layout. On several devices the two rows of
    a prompt share it, where a device has both."""
    shardings = shardings_of(spec, layout)
    step = make_train_step(
        Transformer(spec, layout=layout), OPTIMIZER, preset("gspo", epsilon=0.3, epsilon_high=0.3),
        UpdatePlan(micro_batch_size=micro_batch_size), state_shardings=shardings,
        rows_per_prompt=shared_rows(micro_batch_size or B, layout.parts("rows"), G) if layout.several else 1,
    )  # fmt: skip
    params, found = oracle.build(spec)[1], {}
    for recorded in (False, True) if spec.num_experts else (False,):
        own = jax.tree.map(jnp.copy, params)  # a step donates what it is given
        zeros = jax.tree.map(jnp.zeros_like, params)
        state = jax.device_put(TrainState(jnp.int32(0), own, (zeros, *OPTIMIZER.init({})[1:])), shardings)
        state, metrics = step(state, place(layout, batch_of(spec, recorded)))
        found[recorded] = jax.device_get(state.opt_state[0]), values(jax.device_get(metrics))
    return found, state


@functools.cache
def updates_on_one_device(spec):
    return updates_of(spec, Layout(make_mesh({}, jax.devices()[:1])))[0]


@functools.cache
def rollout_on_one_device(spec, temperature):
    return rollout_of(spec, Layout(make_mesh({}, jax.devices()[:1])), temperature)


def assert_same_updates(found, expected):
    for recorded, (grads, metrics) in found.items():
        expected_grads, expected_metrics = expected[recorded]
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-6), grads, expected_grads)
        for name, value in metrics.items():
            np.testing.assert_allclose(value, expected_metrics[name], rtol=1e-4, atol=2e-5, err_msg=name)


@needs_eight
@pytest.mark.parametrize(
    ("spec", "name"),
    [
        pytest.param(spec, layout, id=f"{name}-{layout}", marks=() if (spec, layout) == KEPT else pytest.mark.slow)
        for name, spec in (("dense", DENSE), ("moe", MOE), ("full", FULL))
        for layout in LAYOUTS
        if name != "full" or layout in ("fsdp2-expert2-tensor2", "data2-expert4-all-to-all", "fsdp-rules")
    ],
)
def test_every_mesh_gives_the_loss_gradients_and_tokens_of_one_device(spec, name):
    # Catches a reduction over the rows of one device only, experts that lose the tokens of other devices or see them
    # twice, offsets of an exchange that are off by one, routes cut along another axis than tokens, a cache written by
    # the wrong device, noise that depends on the mesh; and parameters that come back from an update lying elsewhere.
    sizes, rules, rollout_rules, dispatch = LAYOUTS[name]
    layout = Layout(make_mesh(sizes), rules, dispatch)
    for temperature in (1.0,) if (spec, name) == KEPT else (0, 1.0):  # rows that are drawn are the harder
        expected_rollout = rollout_on_one_device(spec, temperature)
        rollout = rollout_of(spec, dataclasses.replace(layout, rules=rollout_rules), temperature)
        for field in ("tokens_BT", "completion_lengths_B", "routes_LBTX"):
            np.testing.assert_array_equal(getattr(rollout, field), getattr(expected_rollout, field), err_msg=field)
        np.testing.assert_allclose(rollout.logp_BC, expected_rollout.logp_BC, atol=1e-5)
        assert rollout.decode_steps == expected_rollout.decode_steps

    found, state = updates_of(spec, layout)
    assert_same_updates(found, updates_on_one_device(spec))
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(shardings_of(spec, layout)), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    wide = state.params["blocks"]["moe"]["gate"] if spec.num_experts else state.params["blocks"]["mlp"]["gate"]
    cut = (
        set() if rules == "expert" and not spec.num_experts else {"fsdp", "expert", "tensor"}
    )  # "expert" leaves the rest whole
    assert wide.size // wide.addressable_shards[0].data.size == np.prod(
        [size for axis, size in sizes.items() if axis in cut]
    )


@needs_eight
@pytest.mark.slow
@pytest.mark.parametrize("dispatch", ["all_gather", "all_to_all"])
@pytest.mark.parametrize(
    "change", [{"moe_backend": "ragged"}, {"moe_backend": "dense"}, {"remat": True, "attention_chunk": 4}]
)
def test_backends_recomputation_and_micro_batches_agree_across_devices(dispatch, change):
    # Catches a backend that mixes up "another device's expert" with a pad, one that lets the rows past the last group
    # into a gradient, and a gradient that is summed over micro-batches on some devices only.
    spec = dataclasses.replace(MOE, **change)
    layout = Layout(make_mesh({"data": 2, "expert": 4}), dispatch=dispatch)
    assert_same_updates(updates_of(spec, layout, micro_batch_size=8)[0], updates_on_one_device(MOE))


@pytest.mark.slow
@needs_eight
def test_a_bfloat16_update_runs_on_a_mesh():
    # Catches a program that XLA's CPU backend ends the process on: gradients in bfloat16 under a shard_map over some of
    # the axes.
    spec = dataclasses.replace(MOE, dtype="bfloat16")
    found, _ = updates_of(spec, Layout(make_mesh({"data": 2, "expert": 2})))
    expected = updates_on_one_device(MOE)
    for recorded, (grads, metrics) in found.items():
        assert float(metrics["loss"]) == pytest.approx(float(expected[recorded][1]["loss"]), abs=0.05)
        assert all(bool(np.isfinite(leaf).all()) for leaf in jax.tree.leaves(grads))


ADAPTED = dataclasses.replace(MOE, moe_backend="dense", scan_layers=True)


def adapted_on(layout):
    """(adapters, merged weights) after two updates: A moves from the second on."""
    spec, lora = ADAPTED, LoRA(2, 4.0, "attention/, moe")
    model, optimizer = Transformer(spec, layout=layout, adapter_scale=lora.scale), optax.sgd(1.0)
    start = state_on_mesh(layout, model, optimizer, lora=lora)
    shardings = jax.tree.map(lambda x: x.sharding, start.abstract)
    step = make_train_step(
        model, optimizer, preset("gspo", epsilon=0.3, epsilon_high=0.3), UpdatePlan(micro_batch_size=8),
        state_shardings=shardings if layout.several else None, rows_per_prompt=1,
    )  # fmt: skip
    weights = jax.tree.map(jnp.copy, oracle.build(spec)[1])
    state = start.begin(jax.device_put(weights, shardings.frozen), jax.random.key(0))
    for _ in range(2):
        state, _ = step(state, place(layout, batch_of(spec, True)))
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    return jax.device_get((state.params, merge_into(state.frozen, state.params, lora.scale)))


@needs_eight
@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp2-expert2-tensor2", "data2-expert4-all-to-all", "fsdp-rules"])
def test_every_mesh_trains_the_adapters_of_one_device(name):
    # Catches a product of a part of A with a part of B, a gradient summed over the rows of one device, and adapters
    # that an update moves elsewhere.
    sizes, rules, _, dispatch = LAYOUTS[name]
    expected = adapted_on(Layout(make_mesh({}, jax.devices()[:1])))
    found = adapted_on(Layout(make_mesh(sizes), rules, dispatch))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-6), found, expected)
    moved = jax.tree.map(lambda merged, weight: np.abs(merged - weight).max(), found[1], oracle.build(ADAPTED)[1])
    assert moved["blocks"]["moe"]["up"] > 1e-4 and moved["embedding"] == 0
