"""Every objective against its paper: values and gradients of float64 loops (tests/oracles.py), identities, edges,
extremes."""

import functools
import inspect
import itertools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gspo import masked, objectives
from gspo.objectives import diagnostics, ratios, surrogates
from gspo.objectives.aggregations import AGGREGATIONS
from gspo.objectives.kl import KL_LOSSES, KL_WEIGHTS
from gspo.types import LossInputs, UserError

# Everything with a ratio of its own; each has its oracle under the same name.
VARIANTS = {name: {"preset": name} for name in objectives.OBJECTIVES} | {
    "sequence_sum": {"preset": "gspo", "importance_sampling_level": "sequence_sum"},
    "dual_clip": {"preset": "grpo", "delta": 3.0},
}
WITHOUT_RATIO = ("reinforce",)


def few(names, *quick):
    """All names as parameters; those not named after them only with -m slow."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


# Compiled for a quick start: the arrays are tiny, the programs are many.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def objective_of(name, **overrides):
    """One object for the same settings, so that jit does not trace it again."""
    fields = VARIANTS[name] | overrides
    return objectives.make_objective(**objectives.settings(fields.pop("preset"), **fields))


@functools.partial(jit, static_argnums=0)
def loss_and_gradient(objective, logp_BC, old_logp_BC, advantages_BC, mask_BC, extras):
    def loss(logp_BC):
        return objective(LossInputs(logp_BC, old_logp_BC, advantages_BC, mask_BC, **extras))[0].value

    return jax.value_and_grad(loss)(logp_BC)


@functools.partial(jit, static_argnums=0)
def metrics_of(objective, *arrays, **extras):
    return {name: metric.value for name, metric in objective(LossInputs(*arrays, **extras))[1].items()}


def arrays(rows=4, width=6, seed=0, spread=0.3, constant_advantages=True):
    """logp, old_logp, advantages, mask: a full row, a row of one token, an empty row, and rows of any length."""
    rng = np.random.default_rng(seed)
    lengths = np.concatenate([[width, 1, 0], rng.integers(1, width + 1, max(rows - 3, 0))])[:rows]
    mask = np.arange(width)[None] < lengths[:, None]
    old = -np.abs(rng.normal(size=(rows, width))) - 0.5
    advantages = rng.normal(size=(rows, 1 if constant_advantages else width))
    logp = old + spread * rng.normal(size=(rows, width))
    return [a.astype(np.float32) for a in (logp, old, advantages * np.ones((rows, width)))] + [mask]


def router_arrays(rows, width, seed=0):
    """Router log-probs [L, B, C, X], now and then: some tokens moved past the floor of RSPO, some hardly."""
    rng = np.random.default_rng(seed)
    old = -np.abs(rng.normal(size=(2, rows, width, 3)))
    return {"router_logp_LBCX": old + 0.2 * rng.normal(size=old.shape), "old_router_logp_LBCX": old}


# ---------------------------------------------------------------------------- against the papers


def edge_rows(rng, kind, width):
    """Log-ratios of one row, of the kinds at which implementations differ. Edges are met to 1e-5 on either side."""
    side = rng.choice([-1e-5, 1e-5])
    signs = rng.choice([-1, 1])
    return {
        "on policy": np.zeros(width),
        "near": 1e-4 * rng.normal(size=width),
        "usual": 0.2 * rng.normal(size=width),
        "far": 1.5 * rng.normal(size=width),
        "token edge": np.log(np.where(signs > 0, rng.choice([1.2, 1.27, 1.28, 5.0]), 0.8) + side + np.zeros(width)),
        "gmpo edge": signs * 0.4 + side + np.zeros(width),
        "sequence edge": math.log1p(4e-4 if signs > 0 else -3e-4) + side + rng.permutation(np.linspace(-1, 1, width)),
        "luspo edge": math.log1p(2.5e-3 if signs > 0 else -2e-3) + side + np.zeros(width),
    }[kind]


@st.composite
def batches(draw, shapes):
    rows, width = draw(shapes)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kinds = ["on policy", "near", "usual", "far", "token edge", "gmpo edge", "sequence edge", "luspo edge"]
    log_ratio = np.stack([edge_rows(rng, draw(st.sampled_from(kinds)), width) for _ in range(rows)])
    lengths = np.array([draw(st.sampled_from([0, 1, width, width, (width + 1) // 2])) for _ in range(rows)])
    mask = np.arange(width)[None] < lengths[:, None]
    if draw(st.booleans()):  # a loss mask may have gaps: tokens that a tool wrote
        mask &= rng.random((rows, width)) < 0.8
    signs = np.array([draw(st.sampled_from([-1.0, 0.0, 1.0])) for _ in range(rows)])
    advantages = np.repeat((signs * (0.2 + rng.random(rows)))[:, None], width, axis=1)
    old = -np.abs(rng.normal(size=(rows, width))) - 0.1
    logp = old + log_ratio
    for a in (logp, old, advantages):  # what lies under the mask must not matter
        a[~mask] = rng.choice([np.nan, np.inf, -np.inf, 3.0])
    return logp, old, advantages, mask


def check_against_oracle(name, batch):
    logp, old, advantages, mask = batch
    router = router_arrays(*mask.shape) if name == "rspo" else {}
    oracle, rest = getattr(oracles, name), (old, advantages, mask, *router.values())
    with jax.enable_x64(True):
        loss, gradient = loss_and_gradient(objective_of(name), logp, old, advantages, mask, router)
    assert loss.dtype == np.float64
    np.testing.assert_allclose(loss, oracle(logp, logp, *rest), rtol=1e-6, atol=1e-12)
    expected = oracles.gradient(oracle, logp, *rest)
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-6 * np.abs(expected).max() + 1e-9)


# Catches any wrong sum: a missing 1/|y|, a minimum that is a clip, an edge on the wrong side, empty rows counted, a
# gradient through a stopped ratio. In float64, so that nothing hides behind rounding.
@pytest.mark.parametrize("name", VARIANTS)
@hypothesis.given(batch=batches(st.just((4, 5))))
@hypothesis.settings(max_examples=20, deadline=None, derandomize=True)
def test_each_objective_equals_its_paper_in_value_and_gradient(name, batch):
    check_against_oracle(name, batch)


# The same over any small shape, one row of one token among them, and many more examples.
@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
@hypothesis.given(batch=batches(st.tuples(st.integers(1, 5), st.integers(1, 7))))
@hypothesis.settings(max_examples=200, deadline=None, derandomize=True)
def test_each_objective_equals_its_paper_over_many_shapes(name, batch):
    check_against_oracle(name, batch)


# Catches float64 creeping in as the only precision that works: log s_i differs from 0 by 1e-4 and must survive float32.
@pytest.mark.parametrize("name", VARIANTS)
def test_float32_is_enough_for_each_objective(name):
    logp, old, advantages, mask = arrays(spread=3e-4 if name in ("gspo", "gspo_token", "luspo") else 0.3)
    router = router_arrays(*mask.shape) if name == "rspo" else {}
    loss, gradient = loss_and_gradient(objective_of(name), logp, old, advantages, mask, router)
    oracle, rest = getattr(oracles, name), (np.float64(old), np.float64(advantages), mask, *router.values())
    assert loss.dtype == np.float32
    np.testing.assert_allclose(loss, oracle(np.float64(logp), np.float64(logp), *rest), rtol=1e-5)
    expected = oracles.gradient(oracle, logp, *rest)
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


# Catches a row advantage used for GSPO-token, whose reason to exist is advantages that differ along a row.
def test_gspo_token_takes_an_advantage_per_token():
    logp, old, advantages, mask = arrays(spread=3e-4, constant_advantages=False)
    with jax.enable_x64(True):
        batch = [np.float64(a) for a in (logp, old, advantages)]
        loss, gradient = loss_and_gradient(objective_of("gspo_token"), *batch, mask, {})
    np.testing.assert_allclose(loss, oracles.gspo_token(batch[0], *batch, mask), rtol=1e-9)
    expected = oracles.gradient(oracles.gspo_token, *batch, mask)
    np.testing.assert_allclose(gradient, expected, atol=1e-8)


# Catches a product where a geometric mean belongs, and the reverse: the example everybody quotes.
def test_hello_world_has_the_ratios_of_the_example():
    old, logp = np.log([[0.20, 0.10]]), np.log([[0.25, 0.30]])
    mask, advantages = np.ones((1, 2), bool), np.ones((1, 2))
    with jax.enable_x64(True):

        def ratio(level):
            return np.exp(ratios.LOG_RATIOS[level](logp, old, mask))

        np.testing.assert_allclose(ratio("token"), [[1.25, 3.0]], rtol=1e-12)
        np.testing.assert_allclose(ratio("sequence_sum"), [[3.75]], rtol=1e-12)
        np.testing.assert_allclose(ratio("sequence"), [[math.sqrt(3.75)]], rtol=1e-12)
        np.testing.assert_allclose(ratio("sequence_token"), [[math.sqrt(3.75)] * 2], rtol=1e-12)
        assert abs(math.sqrt(3.75) - 1.9365) < 1e-4
        for level in ratios.LOG_RATIOS:
            objective = objectives.make_objective(importance_sampling_level=level, epsilon=0.2, epsilon_high=0.2)
            loss, gradient = loss_and_gradient(objective, logp, old, advantages, mask, {})
            np.testing.assert_allclose(loss, -1.2, rtol=1e-12)  # every one of them is clipped to 1.2
            assert not np.any(gradient)


# Catches s clamped to the absolute range [3e-4, 4e-4], an ε applied to log s, and a clip that acts on the wrong sign of
# Â.
@pytest.mark.parametrize(
    "ratio, advantage, weight, slope",
    [
        (1.0, 1, 1.0, 1), (1.0, -1, 1.0, 1),
        (1 + 3.9e-4, 1, 1 + 3.9e-4, 1), (1 + 4.1e-4, 1, 1 + 4e-4, 0), (1 + 4.1e-4, -1, 1 + 4.1e-4, 1),
        (2.0, -1, 2.0, 1),
        (1 - 2.9e-4, -1, 1 - 2.9e-4, 1), (1 - 3.1e-4, -1, 1 - 3e-4, 0), (1 - 3.1e-4, 1, 1 - 3.1e-4, 1),
        (0.5, 1, 0.5, 1),
    ],
)  # fmt: skip
def test_gspo_clips_around_one_and_only_where_the_advantage_pushes(ratio, advantage, weight, slope):
    with jax.enable_x64(True):
        old, mask = np.full((1, 4), -1.0), np.ones((1, 4), bool)
        logp, advantages = old + math.log(ratio), np.full((1, 4), float(advantage))
        loss, gradient = loss_and_gradient(objective_of("gspo"), logp, old, advantages, mask, {})
        metrics = metrics_of(objective_of("gspo"), logp, old, advantages, mask)
    np.testing.assert_allclose(loss, -weight * advantage, rtol=1e-12)
    np.testing.assert_allclose(gradient, np.full((1, 4), -slope * ratio * advantage / 4), rtol=1e-12)
    assert metrics["clip_ratio/tokens_high"] == (slope == 0 and ratio > 1)
    assert metrics["clip_ratio/tokens_low"] == (slope == 0 and ratio < 1)


# Catches the clip range of one side used on both, and the cap of a dual clip that acts on positive advantages.
@pytest.mark.parametrize(
    "ratio, advantage, value, slope",
    [
        (1.26, 1, 1.26, 1),
        (1.28, 1, 1.27, 0),
        (0.81, -1, -0.81, 1),
        (0.79, -1, -0.8, 0),
        (2.9, -1, -2.9, 1),
        (3.1, -1, -3, 0),
    ],
)
def test_the_dual_clip_has_three_edges(ratio, advantage, value, slope):
    old, mask = np.full((1, 1), -1.0), np.ones((1, 1), bool)
    logp, advantages = old + math.log(ratio), np.full((1, 1), float(advantage))
    loss, gradient = loss_and_gradient(objective_of("dual_clip"), logp, old, advantages, mask, {})
    np.testing.assert_allclose(-loss, value, rtol=1e-6)
    np.testing.assert_allclose(-gradient, [[slope * ratio * advantage]], rtol=1e-6)


# Catches the two being implemented as different methods: the cap of the ratio and the bound of the loss are one thing.
def test_the_two_sided_cap_of_the_ratio_equals_the_dual_clip():
    logp, old, advantages, mask = arrays(rows=16, spread=2.0)
    loss, _ = loss_and_gradient(objective_of("dual_clip", loss_agg_mode="token-mean"), logp, old, advantages, mask, {})
    w = np.exp(logp - old)
    two_sided = np.minimum(np.minimum(w, 3.0) * advantages, np.clip(w, 0.8, 1.27) * advantages)
    np.testing.assert_allclose(loss, -two_sided[mask].mean(), rtol=1e-5)


# ---------------------------------------------------------------------------- identities


# Catches a GSPO-token that clips or weighs tokens by themselves.
@pytest.mark.parametrize("spread", [1e-4, 3e-4, 0.3])
def test_gspo_token_is_gspo_where_advantages_are_constant_along_a_row(spread):
    with jax.enable_x64(True):
        *batch, mask = arrays(rows=12, width=9, spread=spread)
        batch = [np.float64(a) for a in batch]
        one, two = (loss_and_gradient(objective_of(name), *batch, mask, {}) for name in ("gspo", "gspo_token"))
        clipped_one, clipped_two = (metrics_of(objective_of(name), *batch, mask) for name in ("gspo", "gspo_token"))
    np.testing.assert_allclose(one[0], two[0], rtol=1e-12)
    np.testing.assert_allclose(one[1], two[1], rtol=1e-9, atol=1e-15)
    for name in ("tokens_low", "tokens_high", "sequences_low", "sequences_high"):
        assert clipped_one[f"clip_ratio/{name}"] == clipped_two[f"clip_ratio/{name}"]


# Catches a surrogate whose slope at ratio 1 is not 1: a wrong 4/τ, an extra 1/|y|, a ratio that is detached altogether.
@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in WITHOUT_RATIO])
def test_at_ratio_one_every_objective_has_the_gradient_of_reinforce(name):
    _, old, advantages, mask = arrays()
    router = router_arrays(*mask.shape) if name == "rspo" else {}
    if router:
        router["router_logp_LBCX"] = router["old_router_logp_LBCX"]
    _, gradient = loss_and_gradient(objective_of(name), old, old, advantages, mask, router)
    mode = objectives.settings(VARIANTS[name]["preset"])["loss_agg_mode"]
    if (
        name == "sequence_sum"
    ):  # d S / d log π_t is S, and not S/|y|: tokens are summed whatever the mean over identical values
        mode = "seq-mean-token-sum"
    _, expected = loss_and_gradient(objective_of("reinforce", loss_agg_mode=mode), old, old, advantages, mask, {})
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-8)


# Catches GRPO and GSPO differing in anything else than the ratio: with one update per rollout all ratios are 1.
def test_with_one_update_per_rollout_grpo_and_gspo_are_the_same_algorithm():
    _, old, advantages, mask = arrays()
    grpo, gspo, token = (
        loss_and_gradient(objective_of(name), old, old, advantages, mask, {}) for name in ("grpo", "gspo", "gspo_token")
    )
    np.testing.assert_allclose(grpo[0], gspo[0], rtol=1e-6)
    np.testing.assert_allclose(grpo[1], gspo[1], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(grpo[1], token[1], rtol=1e-6, atol=1e-9)
    means = [advantages[i][mask[i]].mean() for i in range(4) if mask[i].any()]
    np.testing.assert_allclose(grpo[0], -np.mean(means), rtol=1e-5)


# Catches a SAPO whose gate is not the identity to second order at 1: f(w) = f(1) + (w − 1) + O((w − 1)³).
def test_sapo_is_the_unclipped_ratio_near_one():
    with jax.enable_x64(True):
        old, mask = np.full((1, 3), -1.0), np.ones((1, 3), bool)
        for advantage, step in itertools.product((-1.0, 1.0), (-1e-3, 1e-3)):
            advantages = np.full((1, 3), advantage)
            at_one, _ = loss_and_gradient(objective_of("sapo"), old, old, advantages, mask, {})
            near, gradient = loss_and_gradient(objective_of("sapo"), old + math.log1p(step), old, advantages, mask, {})
            np.testing.assert_allclose(near - at_one, -advantage * step, rtol=1e-6)
            np.testing.assert_allclose(gradient, np.full((1, 3), -advantage * (1 + step) / 3), rtol=1e-6)


# Catches a GMPO whose mean is arithmetic, or taken after the exponential.
def test_gmpo_is_gspo_where_nothing_clips():
    *batch, mask = arrays(spread=0.05)
    mask = np.ones_like(mask)
    gmpo = loss_and_gradient(objective_of("gmpo"), *batch, mask, {})
    gspo = loss_and_gradient(objective_of("gspo", epsilon=0.5, epsilon_high=0.5), *batch, mask, {})
    np.testing.assert_allclose(gmpo[0], gspo[0], rtol=1e-6)
    np.testing.assert_allclose(gmpo[1], gspo[1], rtol=1e-5, atol=1e-8)


# Catches a length weight that enters twice or not at all.
def test_luspo_is_gspo_weighted_by_length():
    *batch, mask = arrays(rows=1, width=6)
    fields = {"epsilon": 2e-3, "epsilon_high": 2.5e-3}
    luspo = loss_and_gradient(objective_of("luspo"), *batch, mask, {})
    gspo = loss_and_gradient(objective_of("gspo", **fields), *batch, mask, {})
    np.testing.assert_allclose(luspo[0], 6 * gspo[0], rtol=1e-6)
    np.testing.assert_allclose(luspo[1], 6 * gspo[1], rtol=1e-5, atol=1e-8)


# Catches CISPO letting the gradient through the ratio, which would double it at w = 1 and keep it for tokens without
# advantage.
def test_the_gradient_of_cispo_flows_through_the_log_probability_only():
    logp, old, advantages, mask = arrays(spread=2.0)
    _, gradient = loss_and_gradient(objective_of("cispo"), logp, old, advantages, mask, {})
    expected = -np.minimum(np.exp(logp - old), 5.0) * advantages * mask / mask.sum()
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-8)


# Catches a router shift that is differentiated, has no floor, or moves ratios although no router moved.
def test_the_router_shift_scales_ratios_down_to_its_floor_and_has_no_gradient():
    mask = np.ones((1, 3), bool)
    old = np.log(np.full((2, 1, 3, 2), 0.5))
    moved = old + np.array([0.0, 0.1, 5.0])[None, None, :, None]

    def shift(router):
        inputs = LossInputs(None, None, None, mask, router_logp_LBCX=router, old_router_logp_LBCX=old)
        return ratios.router_shift(inputs, floor=0.8)

    np.testing.assert_allclose(np.exp(shift(moved))[0], [1, math.exp(-0.1), 0.8], rtol=1e-6)
    gradient = jax.grad(lambda router: shift(router).sum())(moved)
    assert not np.any(gradient)


# ---------------------------------------------------------------------------- aggregation

MODES = list(AGGREGATIONS)


def summed(objective, logp, old, advantages, mask):
    """(Mean, gradient of its total): what a step adds up over micro-batches."""

    def total(logp):
        loss, _ = objective(LossInputs(logp, old, advantages, mask))
        return loss.total, loss

    gradient, loss = jax.grad(total, has_aux=True)(logp)
    return loss, gradient


@functools.partial(jit, static_argnums=0)
def aggregated(mode, x, mask):
    aggregate = AGGREGATIONS[mode]
    return aggregate(x, mask), jax.grad(lambda x: aggregate(x, mask).total)(x)


# Catches a mean of means, a count that depends on values, and a row of padding that is counted.
@pytest.mark.parametrize("mode", MODES)
@hypothesis.given(cuts=st.lists(st.integers(1, 5), max_size=5, unique=True), seed=st.integers(0, 2**32 - 1))
@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
def test_any_split_into_micro_batches_adds_up_to_the_whole(mode, cuts, seed):
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        x, mask = rng.normal(size=(6, 4)), rng.random((6, 4)) < rng.random((6, 1))
        whole, gradient = aggregated(mode, x, mask)
        edges = [0, *sorted(cuts), 6]
        parts = [aggregated(mode, x[i:j], mask[i:j]) for i, j in itertools.pairwise(edges)]
        total = functools.reduce(lambda a, b: a + b, [part for part, _ in parts])
        np.testing.assert_allclose(total.value, whole.value, rtol=1e-12, atol=1e-15)
        assert total.count == whole.count
        np.testing.assert_allclose(np.concatenate([g for _, g in parts]), gradient, rtol=1e-12)


# The same for whole objectives: catches a weight, a ratio or a penalty that is normalised by something in the batch.
@pytest.mark.parametrize("name", few([name for name in VARIANTS if name != "rspo"], "gspo", "gmpo"))
def test_objectives_add_up_over_micro_batches(name):
    batch = arrays(rows=7)
    jitted = jit(summed, static_argnums=0)
    whole, gradient = jitted(objective_of(name), *batch)
    parts = [jitted(objective_of(name), *(a[i:j] for a in batch)) for i, j in ((0, 2), (2, 3), (3, 7))]
    total = functools.reduce(lambda a, b: a + b, [part for part, _ in parts])
    np.testing.assert_allclose(total.value, whole.value, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        np.concatenate([g for _, g in parts]) / total.count, gradient / whole.count, rtol=1e-5, atol=1e-8
    )


@functools.partial(jit, static_argnums=0)
def summed_in_all_modes(level, logp, old, advantages, mask):
    """Per mode, (Mean, gradient of its total)."""
    fields = {"importance_sampling_level": level, "loss_norm_length": 5}
    return {
        mode: summed(objectives.make_objective(loss_agg_mode=mode, **fields), logp, old, advantages, mask)
        for mode in MODES
    }


# Catches divisions by local counts: rows of very different lengths lie on different devices. Once as the partitioner
# does it, once as written out by hand: sums and counts added over devices, then divided.
def test_eight_devices_give_the_result_of_one():
    assert jax.device_count() >= 8
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    batch = arrays(rows=16, width=5)
    sharded = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    one, eight = summed_in_all_modes("sequence", *batch), summed_in_all_modes("sequence", *sharded)

    @jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec())
    def by_hand(*local):
        return jax.lax.psum(
            {mode: objective_of("gspo", loss_agg_mode=mode)(LossInputs(*local))[0] for mode in MODES[:3]}, "data"
        )

    for mode, (loss, gradient) in one.items():
        assert len(eight[mode][1].sharding.device_set) == 8
        np.testing.assert_allclose(eight[mode][0].value, loss.value, rtol=1e-5)
        np.testing.assert_allclose(eight[mode][1], gradient, rtol=1e-5, atol=1e-8)
    for mode, loss in by_hand(*sharded).items():
        np.testing.assert_allclose(loss.value, one[mode][0].value, rtol=1e-5)


# Catches the width of the frame, or the place of a row, entering a loss. The constant-length mode gets its constant.
@pytest.mark.parametrize("level", few(ratios.LOG_RATIOS, "token", "sequence"))
def test_padding_and_the_order_of_rows_do_not_matter(level):
    with jax.enable_x64(True):
        *batch, mask = arrays(rows=6, width=5)
        batch = [*(np.float64(a) for a in batch), mask]
        plain = summed_in_all_modes(level, *batch)
        wide = [np.pad(a, ((1, 1), (0, 3)), constant_values=False if a.dtype == bool else np.nan) for a in batch]
        padded = summed_in_all_modes(level, *wide)
        order = np.random.default_rng(0).permutation(6)
        turned = summed_in_all_modes(level, *(a[order] for a in batch))
    for mode, (loss, gradient) in plain.items():
        np.testing.assert_allclose(padded[mode][0].total, loss.total, rtol=1e-12)
        assert padded[mode][0].count == loss.count == turned[mode][0].count
        np.testing.assert_allclose(padded[mode][1][1:-1, :5], gradient, rtol=1e-9, atol=1e-15)
        assert not np.any(padded[mode][1][:, 5:]) and not np.any(padded[mode][1][0])
        np.testing.assert_allclose(turned[mode][0].total, loss.total, rtol=1e-12)
        np.testing.assert_allclose(turned[mode][1], gradient[order], rtol=1e-9, atol=1e-15)


# Catches aggregations swapped, and rows without a token in the denominator.
def test_the_four_aggregations_differ_as_their_names_say():
    x = np.array([[1.0, 2.0, 3.0, np.nan], [10.0, np.nan, np.nan, np.nan], [np.inf] * 4])
    mask = np.isfinite(x)
    values = {mode: float(f(x, mask).value) for mode, f in AGGREGATIONS.items()}
    assert values == {
        "seq-mean-token-mean": (2 + 10) / 2,
        "token-mean": 16 / 4,
        "seq-mean-token-sum": (6 + 10) / 2,
        "seq-mean-token-sum-norm": (6 + 10) / 2 / 4,
    }


# Catches 0/0: a micro-batch may hold only rows whose tokens are all masked.
@pytest.mark.parametrize("name", VARIANTS)
def test_a_batch_without_a_single_token_gives_zero_loss_gradient_and_metrics(name):
    *batch, mask = arrays()
    router = router_arrays(*mask.shape) if name == "rspo" else {}
    mask = np.zeros_like(mask)
    loss, gradient = loss_and_gradient(objective_of(name), *batch, mask, router)
    assert loss == 0 and not np.any(gradient)
    if name in ("grpo", "gspo"):
        metrics = metrics_of(objective_of(name), *batch, mask)
        assert all(value == 0 for value in metrics.values()), metrics


# ---------------------------------------------------------------------------- KL and corrections

POLICY_LOGITS = np.array([0.3, -1.0, 0.8, 0.1, -0.4])
OTHER_LOGITS = np.array([-0.5, 0.4, 0.2, 0.9, -0.2])
REF_LOGITS = np.array([0.1, 0.6, -0.3, 0.0, 0.5])


@functools.partial(jit, static_argnums=(2, 3))
@functools.partial(jax.value_and_grad)
def expected_penalty(logits, sampled_from, estimator, weight):
    """E over the five tokens, drawn from `sampled_from`, of weight · estimator: every token once, weighted by its
    probability."""
    logp, old, ref = (jax.nn.log_softmax(z)[None] for z in (logits, sampled_from, REF_LOGITS))
    mask = np.ones((1, 5), bool)
    k = KL_WEIGHTS[weight](logp, old, mask) * KL_LOSSES[estimator](logp, ref)
    return jnp.sum(jax.lax.stop_gradient(jnp.exp(old)) * k)


def kl(p_logits, q_logits):
    p, q = jax.nn.log_softmax(p_logits), jax.nn.log_softmax(q_logits)
    return jnp.sum(jnp.exp(p) * (p - q))


# Catches k1 taken for a loss that pulls to the reference, and any claim of the table in gspo/objectives/kl.py that is
# not so.
@pytest.mark.parametrize(
    "estimator, weight, on_policy, value_exact, gradient_of",
    [
        ("k1", "none", True, True, "nothing"), ("k2", "none", True, False, "reverse"),
        ("k3", "none", True, True, "forward"),
        ("k1", "stopped", False, True, "nothing"), ("k2", "stopped", False, False, "reverse"),
        ("k3", "stopped", False, True, "forward"),
        ("k1", "differentiable", False, True, "reverse"), ("k2", "differentiable", False, False, "neither"),
        ("k3", "differentiable", False, True, "reverse"),
        ("k2", "none", False, False, "neither"), ("k3", "none", False, False, "neither"),
    ],
)  # fmt: skip
def test_kl_estimators_have_the_bias_that_their_table_says(estimator, weight, on_policy, value_exact, gradient_of):
    with jax.enable_x64(True):
        old = POLICY_LOGITS if on_policy else OTHER_LOGITS
        value, gradient = expected_penalty(POLICY_LOGITS, old, estimator, weight)
        reverse = jax.grad(kl)(POLICY_LOGITS, REF_LOGITS)
        forward = jax.grad(lambda z: kl(REF_LOGITS, z))(POLICY_LOGITS)
        exact = kl(POLICY_LOGITS, REF_LOGITS)
    assert np.isclose(value, exact, rtol=1e-9) == value_exact
    candidates = {"nothing": np.zeros(5), "reverse": reverse, "forward": forward}
    holds = {name for name, candidate in candidates.items() if np.allclose(gradient, candidate, atol=1e-9)}
    assert holds == ({gradient_of} if gradient_of != "neither" else set())


# Catches a coefficient on the wrong term, a sign, or a penalty that is aggregated in another way than the loss.
@pytest.mark.parametrize("mode", MODES[:2])
def test_kl_and_entropy_enter_the_loss_with_their_coefficients(mode):
    logp, old, advantages, mask = arrays()
    rng = np.random.default_rng(1)
    ref, entropy = (rng.normal(size=logp.shape).astype(np.float32) for _ in range(2))
    plain, _ = loss_and_gradient(objective_of("grpo", loss_agg_mode=mode), logp, old, advantages, mask, {})
    objective = objective_of("grpo", loss_agg_mode=mode, beta=0.3, kl_loss_type="k2", entropy_coef=0.05)
    assert objective.needs == ("ref_logp_BC", "entropy_BC")
    extras = {"ref_logp_BC": ref, "entropy_BC": entropy}
    loss, _ = loss_and_gradient(objective, logp, old, advantages, mask, extras)
    metrics = metrics_of(objective, logp, old, advantages, mask, **extras)
    extra = AGGREGATIONS[mode](0.3 * (ref - logp) ** 2 / 2 - 0.05 * entropy, mask)
    np.testing.assert_allclose(loss, plain + extra.value, rtol=1e-5)
    np.testing.assert_allclose(metrics["entropy"], entropy[mask].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss/policy"], plain, rtol=1e-5)
    with pytest.raises(ValueError, match="ref_logp_BC, entropy_BC"):
        objective(LossInputs(logp, old, advantages, mask))


# Catches π_θ in the place of π_old in ρ, a band on the wrong level, and gradients through a weight.
@pytest.mark.parametrize("method", ["tis", "mis", "icepop", "seq_tis", "seq_mis", "geo_rs"])
def test_corrections_for_the_sampler_weigh_as_their_authors_say(method):
    logp, old, advantages, mask = arrays(rows=12, width=5)
    rng = np.random.default_rng(2)
    spread = np.array([0, 1e-4, 1e-3, 0.1, 0.5, 1.5] * 2)[:, None]
    sampler = (old + spread * rng.normal(size=old.shape)).astype(np.float32)
    objective = objective_of("reinforce", sampler_is=method, loss_agg_mode="token-mean")
    weights = oracles.sampler_weights(method, np.float64(old), np.float64(sampler), mask)
    loss, gradient = loss_and_gradient(objective, logp, old, advantages, mask, {"sampler_logp_BC": sampler})
    np.testing.assert_allclose(gradient, -weights * advantages * mask / mask.sum(), rtol=2e-5, atol=1e-8)
    np.testing.assert_allclose(loss, -(weights * advantages * logp)[mask].sum() / mask.sum(), rtol=1e-4)
    if method not in ("tis", "seq_mis"):
        return
    metrics = metrics_of(objective, logp, old, advantages, mask, sampler_logp_BC=sampler)
    np.testing.assert_allclose(metrics["sampler/weight_mean"], weights[mask].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["sampler/kept"], (weights != 0)[mask].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["sampler/k1"], (sampler - old)[mask].mean(), rtol=1e-4, atol=1e-7)


# Catches an off-policy mask that drops successes, or measures drift in the wrong direction; dropped rows stay in the
# count.
def test_the_off_policy_mask_drops_failures_that_the_policy_has_left_behind():
    old, mask = np.full((4, 3), -1.0, np.float32), np.ones((4, 3), bool)
    logp = old + np.array([[-0.1], [-0.1], [0.1], [-1e-5]], np.float32)
    advantages = np.array([[-1.0], [1.0], [-1.0], [-1.0]], np.float32) * np.ones((4, 3), np.float32)
    objective = objective_of("reinforce", off_policy_mask_threshold=1e-4, loss_agg_mode="seq-mean-token-mean")
    _, gradient = loss_and_gradient(objective, logp, old, advantages, mask, {})
    np.testing.assert_allclose(gradient, -np.array([[0.0], [1.0], [-1.0], [-1.0]]) / 12 * np.ones((4, 3)), rtol=1e-6)


# ---------------------------------------------------------------------------- extremes


# Catches exp(log-ratio) overflowing, inf − inf and 0 · inf, in losses, gradients and metrics: the sum of log-ratios of
# one of these sequences is 2.6 million.
@pytest.mark.parametrize("dtype", few([jnp.float32, jnp.bfloat16], jnp.float32))
@pytest.mark.parametrize("name", few(VARIANTS, "grpo", "gspo_token", "sequence_sum", "gmpo"))
def test_nothing_overflows_at_log_ratios_of_80_over_32768_tokens(name, dtype):
    width = 32_768
    sign = np.stack([np.ones(width), -np.ones(width), np.tile([1, -1], width // 2), np.ones(width), -np.ones(width)])
    old = np.where(sign > 0, -80.5, -0.5)
    logp = old + 80 * sign
    advantages = np.array([[1.0], [-1.0], [1.0], [-1.0], [1.0]]) * np.ones((1, width))
    logp, old, advantages = (jnp.asarray(a, dtype) for a in (logp, old, advantages))
    router = {}
    if name == "rspo":
        router = {key: jnp.asarray(s * np.ones((1, 5, width, 1)), dtype) for key, s in
                  (("router_logp_LBCX", -80.0), ("old_router_logp_LBCX", 0.0))}  # fmt: skip
    extras = {"ref_logp_BC": old, "sampler_logp_BC": logp, "entropy_BC": advantages} | router
    objective = objective_of(
        name,
        beta=0.1,
        kl_importance="differentiable",
        entropy_coef=0.1,
        sampler_is="tis",
        off_policy_mask_threshold=1e-4,
    )
    mask = np.ones((5, width), bool)
    loss, gradient = loss_and_gradient(objective, logp, old, advantages, mask, extras)
    assert loss.dtype == jnp.float32 and gradient.dtype == dtype
    assert np.isfinite(loss) and np.all(np.isfinite(np.float32(gradient)))
    if dtype == jnp.float32:
        metrics = metrics_of(objective, logp, old, advantages, mask, **extras)
        assert all(np.isfinite(value) for value in metrics.values()), metrics


# Catches a bound on the log-ratio that changes a result which the clip decides.
@pytest.mark.parametrize("name", ["grpo", "gspo", "sequence_sum", "dual_clip", "cispo", "gmpo", "minirl"])
def test_past_every_clip_a_larger_ratio_changes_nothing(name):
    old, mask = np.full((1, 2), -70.0), np.ones((1, 2), bool)
    results = [
        loss_and_gradient(objective_of(name), old + far, old, np.ones((1, 2)), mask, {})[0] for far in (10.0, 60.0)
    ]
    if name in ("cispo", "minirl"):  # linear in log π, whose weight is what is bounded
        results = [float(r) / (70.0 - far) for r, far in zip(results, (10.0, 60.0), strict=True)]
    np.testing.assert_allclose(results[0], results[1], rtol=1e-6)


# ---------------------------------------------------------------------------- metrics


# Catches shares that count padding, that count a clip on the harmless side, and sequences where tokens are meant.
def test_clip_shares_say_what_they_count():
    log_w = np.log(np.array([[1.5, 0.5, 1.0, 1.5], [1.5, 0.5, 0.5, 1.0], [1.0, 1.0, 1.0, 1.0], [1.5, 1.5, 1.5, 1.5]]))
    mask = np.array([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    advantages = np.array([[1.0], [-1.0], [1.0], [1.0]]) * np.ones((4, 4))
    old = np.full((4, 4), -2.0)
    token = metrics_of(objective_of("grpo"), old + log_w, old, advantages, mask)
    expected = {"tokens_low": 2 / 8, "tokens_high": 1 / 8, "tokens": 3 / 8}
    expected |= {"sequences_low": 1 / 3, "sequences_high": 1 / 3, "sequences": 2 / 3}
    expected |= {"low_mean": 2 / 8, "high_mean": 1 / 8, "region_mean": 3 / 8}
    for name, share in expected.items():
        np.testing.assert_allclose(token[f"clip_ratio/{name}"], share, rtol=1e-6, err_msg=name)
    # Row 0 has s = 0.75^(1/3) < 1 and Â > 0: free. Row 1 has s = 0.375^(1/4) < 1 and Â < 0: all four tokens are clipped
    # low.
    sequence = metrics_of(objective_of("gspo"), old + log_w, old, advantages, mask)
    expected = {"tokens_low": 4 / 8, "tokens_high": 0, "tokens": 4 / 8, "sequences_low": 1 / 3, "sequences_high": 0}
    expected |= {"low_mean": 1 / 3, "high_mean": 0, "region_mean": 1 / 3}
    for name, share in expected.items():
        np.testing.assert_allclose(sequence[f"clip_ratio/{name}"], share, rtol=1e-6, err_msg=name)


# Catches padding that makes a sequence count as clipped.
def test_clips_under_the_mask_are_not_counted():
    cut, mask = np.ones((2, 3), bool), np.array([[True, False, False], [False] * 3])
    shares = diagnostics.clip_shares(cut & ~mask, cut, mask, per_sequence=False)
    assert shares["clip_ratio/sequences_low"].value == shares["clip_ratio/tokens_low"].value == 0
    assert shares["clip_ratio/sequences_high"].value == shares["clip_ratio/tokens_high"].value == 1


# Catches ratios of padding in the extremes, the variance of the wrong unit, a weighted mean of sequences by length.
def test_ratio_metrics_equal_a_brute_force_count():
    logp, old, advantages, mask = arrays(rows=40, width=30)
    token = (logp - old)[mask].astype(np.float64)
    sequence = np.array([(logp - old)[i][mask[i]].mean() for i in range(40) if mask[i].any()], np.float64)
    for name, log_w in (("grpo", token), ("gspo", sequence)):
        metrics = metrics_of(objective_of(name), logp, old, advantages, mask)
        w = np.exp(log_w)
        expected = {
            "ratio/min": w.min(), "ratio/mean": w.mean(), "ratio/max": w.max(), "ratio/p99": np.quantile(w, 0.99),
            "ess": w.sum() ** 2 / (len(w) * (w**2).sum()),
            "log_ratio/abs_max": np.abs(token).max(), "log_ratio/token_var": token.var(),
            "log_ratio/abs_p999": np.quantile(np.abs(token), 0.999, method="lower"),
            "log_ratio/sequence_var": sequence.var(),
            "approx_kl/k1": -token.mean(), "approx_kl/k3": (np.exp(token) - 1 - token).mean(),
            "advantage/mean": advantages[mask].mean(), "advantage/std": advantages[mask].std(),
            "advantage/abs_max": np.abs(advantages[mask]).max(),
        }  # fmt: skip
        for key, value in expected.items():
            np.testing.assert_allclose(metrics[key], value, rtol=1e-3, err_msg=key)


# Catches a mean of means, and an extreme that is averaged or takes the 0 of an empty part: the parts hold 13 tokens in
# 3 rows, 7 in 3, 1 in 1 and none at all.
@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_metrics_of_unequal_minibatches_add_up_to_those_of_the_whole(name):
    logp, old, advantages, _ = arrays(rows=8, width=6)
    mask = np.arange(6) < np.array([6, 6, 1, 3, 2, 2, 1, 0])[:, None]
    extras = {"sampler_logp_BC": old + 0.1 * np.random.default_rng(3).normal(size=old.shape), "entropy_BC": -old}
    whole = LossInputs(logp, old, advantages, mask, **extras)
    objective, parts = objective_of(name), []
    for rows in (slice(0, 3), slice(3, 6), slice(6, 7), slice(7, 8)):
        parts.append(objective(jax.tree.map(lambda x, rows=rows: x[rows], whole))[1])
    found, expected = masked.values(masked.added(parts)), masked.values(objective(whole)[1])
    of_an_update = {
        "log_ratio/abs_p999",
        "ratio/p99",
        "ess",
        "log_ratio/token_var",
        "log_ratio/sequence_var",
        "advantage/std",
    }
    means_of_means = {key: np.mean([part[key].value for part in parts]) for key in expected}
    assert found.keys() == expected.keys() and len(found) > 25
    for key in found.keys() - of_an_update:
        np.testing.assert_allclose(found[key], expected[key], rtol=1e-5, atol=1e-6, err_msg=key)
    for key in of_an_update:  # declared as means over updates, here over the three that have a token
        np.testing.assert_allclose(found[key], np.mean([part[key].value for part in parts[:3]]), rtol=1e-5)
    for key in ("clip_ratio/tokens", "entropy", "ratio/min", "ratio/mean", "sampler/k1"):
        assert abs(means_of_means[key] - expected[key]) > 1e-3, key  # what this test looks for can be seen


# Catches metrics that reach into the gradient, or that cost a trace of their own for each batch.
def test_metrics_carry_no_gradient_and_a_step_is_traced_once():
    traces = []

    @functools.partial(jit, static_argnums=0)
    def step(objective, *batch):
        traces.append(1)

        def total(logp):
            return sum(metric.value for metric in objective(LossInputs(logp, *batch[1:]))[1].values())

        return jax.grad(total)(batch[0])

    for seed in range(3):
        assert not np.any(step(objective_of("gspo"), *arrays(seed=seed)))
    assert len(traces) == 1


# ---------------------------------------------------------------------------- names, settings


# Catches a message that does not lead to the remedy: the field, what is wrong, the nearest name.
@pytest.mark.parametrize(
    "fields, message",
    [
        ({"surrogate": "cipso"}, r"objective\.surrogate: no 'cipso'; did you mean 'cispo'\?"),
        (
            {"importance_sampling_level": "sequences"},
            r"objective\.importance_sampling_level: .* did you mean 'sequence'\?",
        ),
        ({"loss_agg_mode": "token_mean"}, r"objective\.loss_agg_mode: .* did you mean 'token-mean'\?"),
        ({"kl_loss_type": "k4"}, r"objective\.kl_loss_type: no 'k4'"),
        ({"kl_importance": "yes"}, r"objective\.kl_importance: no 'yes'"),
        ({"sampler_is": "ice-pop"}, r"objective\.sampler_is: .* did you mean 'icepop'\?"),
        ({"epsilonn": 0.1}, r"objective\.epsilonn: no such field; did you mean 'epsilon'\?"),
        ({"epsilon": -0.1}, r"objective\.epsilon: -0.1 will not do"),
        ({"epsilon_high": float("nan")}, r"objective\.epsilon_high: nan will not do"),
        ({"epsilon": True}, r"objective\.epsilon: True will not do"),
        ({"delta": 1.0}, r"objective\.delta: 1.0 will not do; it must exceed 1 \+ epsilon_high"),
        ({"surrogate": "cispo", "delta": 6.0}, r"objective\.delta: the surrogate 'cispo' has no such bound"),
        ({"surrogate": "gmpo"}, r"objective\.importance_sampling_level: 'gmpo'"),
        ({"beta": "0.1"}, r"objective\.beta: '0.1' will not do"),
        ({"temperature_pos": 0}, r"objective\.temperature_pos: 0 will not do"),
        ({"router_shift_floor": 1.5}, r"objective\.router_shift_floor"),
        ({"loss_norm_length": 0}, r"objective\.loss_norm_length"),
        ({"sampler_is": "icepop", "sampler_is_high": 0.1}, r"objective\.sampler_is_high: 0.1 will not do"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_field_and_remedy(fields, message):
    with pytest.raises(UserError, match=message) as error:
        objectives.make_objective(**fields)
    assert "\n" not in str(error.value)


def test_an_unknown_preset_names_the_nearest():  # catches a KeyError at the user
    with pytest.raises(UserError, match=r"objective\.preset: no 'gsop'; did you mean 'gspo'\?"):
        objectives.preset("gsop")


# Catches presets that drift from their papers, defaults that ignore the level, and overrides that are ignored.
def test_clip_ranges_default_by_level_and_give_way_to_overrides():
    def clip_range(name, **overrides):
        s = objectives.settings(name, **overrides)
        return s["epsilon"], s["epsilon_high"]

    assert clip_range("gspo") == clip_range("gspo_token") == (3e-4, 4e-4)
    assert clip_range("grpo") == clip_range("gspo", importance_sampling_level="sequence_sum") == (0.2, 0.27)
    assert clip_range("gspo", importance_sampling_level="token") == (0.2, 0.27)
    assert clip_range("dapo") == (0.2, 0.28) and clip_range("dapo", epsilon_high=0.3) == (0.2, 0.3)
    assert clip_range("gspo", epsilon=3e-3, epsilon_high=None) == (3e-3, 4e-4)
    assert clip_range(None, surrogate="cispo") == (1.0, 4.0) and clip_range("gmpo") == (0.4, 0.4)


def parts_of(objective):
    """The functions of an objective and their constants, which compare by value."""
    plain = lambda f: (f.func, f.keywords) if isinstance(f, functools.partial) else f  # noqa: E731
    return {
        name: [tuple(map(plain, x)) if isinstance(x, tuple) else plain(x) for x in value]
        if isinstance(value, tuple)
        else plain(value)
        for name, value in vars(objective).items()
    }


# Catches settings that change when they are read back from a saved config, and an override that reaches no function.
@pytest.mark.parametrize("name", VARIANTS)
def test_settings_are_idempotent_and_make_the_same_objective(name):
    fields = dict(VARIANTS[name])
    s = objectives.settings(fields.pop("preset"), **fields)
    assert objectives.settings(None, **s) == s
    assert parts_of(objectives.make_objective(**s)) == parts_of(objective_of(name))
    assert parts_of(objective_of(name, beta=0.1)) != parts_of(objective_of(name))


# Catches a constant that the table forgets (the surrogate would not run) or names in vain, and a surrogate without an
# entry.
def test_the_table_of_constants_lists_what_each_surrogate_takes():
    assert surrogates.CONSTANTS.keys() == surrogates.SURROGATES.keys()
    for name, function in surrogates.SURROGATES.items():
        assert set(surrogates.CONSTANTS[name]) == set(inspect.getfullargspec(function).kwonlyargs), name


# Catches silence where a run is set up to show nothing, and noise where it is set up well.
@pytest.mark.parametrize(
    "name, overrides, updates, words",
    [
        ("gspo", {}, 4, []), ("grpo", {}, 4, []), ("dapo", {}, 4, []), ("reinforce", {}, 1, []), ("cispo", {}, 16, []),
        ("gspo", {}, 1, ["same algorithm"]), ("reinforce", {}, 4, ["second update"]),
        ("gspo", {"epsilon": 0.2, "epsilon_high": 0.27}, 4, ["token ratios"]),
        ("dapo", {"importance_sampling_level": "sequence"}, 4, ["token ratios", "token-mean"]),
        ("grpo", {"epsilon": 3e-4, "epsilon_high": 4e-4}, 4, ["nearly everything"]),
        ("gspo", {"epsilon": 3e-3}, 4, ["only one of them"]), ("gspo", {"loss_agg_mode": "token-mean"}, 4, ["length"]),
        ("dr_grpo", {}, 4, ["loss_norm_length"]), ("grpo", {"beta": 0.1, "kl_loss_type": "k1"}, 4, ["no expected "
                                                                                                    "gradient"]),
    ],
)  # fmt: skip
def test_settings_that_are_probably_not_meant_are_warned_about(name, overrides, updates, words):
    found = objectives.warnings_of(objectives.settings(name, **overrides), updates)
    assert len(found) == len(words), found
    assert all(any(word in line for line in found) and "\n" not in "".join(found) for word in words), found
