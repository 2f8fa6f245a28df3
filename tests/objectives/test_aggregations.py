"""Sums over rows and tokens: in any split, on any devices, under any padding; and how the four differ."""

import functools
import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gspo import objectives
from gspo.objectives import ratios
from gspo.objectives.aggregations import AGGREGATIONS
from gspo.types import LossInputs
from tests.loss_arrays import VARIANTS, arrays, few, jit, loss_and_gradient, metrics_of, objective_of, router_arrays

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
