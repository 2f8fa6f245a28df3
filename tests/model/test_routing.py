"""Top-k routing, replay of given routes, and the measures of drift and load, against loops and sets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspo.model.routing import (
    balance_loss,
    by_layer,
    experts_changed,
    load_by_layer,
    route,
    route_dtype,
    router_kl,
    router_margin,
    swap_experts,
    top_k_experts,
    variance_share,
    z_loss,
)
from tests import model_oracle as oracle

RENORMALISE = pytest.mark.parametrize("renormalise", [True, False])
route = jax.jit(route, static_argnums=1, static_argnames=("renormalise", "scale"))
experts_changed, load_by_layer = jax.jit(experts_changed), jax.jit(load_by_layer, static_argnums=2)
M, E, X = 6, 5, 2


def logits_of(seed=0, scale=2.0):
    return (scale * np.random.default_rng(seed).standard_normal((M, E))).astype(np.float32)


def test_top_k_is_in_falling_order_and_ties_go_to_the_lower_index():
    # Catches an order that differs between two passes over equal logits: replay would then look like drift. The two
    # zeros are equal, too.
    z = np.array([[0.0, 3, 1, 3], [2, 2, 2, 2], [-1, -5, -1, 0], [-0.0, 0.0, -0.0, 0.0]], np.float32)
    for choose in (top_k_experts, jax.jit(top_k_experts, static_argnums=1)):
        np.testing.assert_array_equal(choose(z, 3), [[1, 3, 2], [0, 1, 2], [3, 0, 2], [0, 1, 2]])


@RENORMALISE
@pytest.mark.parametrize("k", [1, 2, 5])
def test_gates_are_the_softmax_at_the_chosen_experts(k, renormalise):
    # Catches a softmax over the chosen logits where the full one is asked for, and the other way round; k = 1 and k = E
    # included.
    z = logits_of()
    gates, used, free = route(z, k, renormalise=renormalise)
    for m in range(M):
        chosen = oracle.top_k(z[m].astype(np.float64), k)
        np.testing.assert_array_equal(used[m], chosen)
        np.testing.assert_allclose(gates[m], oracle.gates_of(z[m].astype(np.float64), chosen, renormalise), rtol=1e-5)
    np.testing.assert_array_equal(used, free)
    assert gates.dtype == jnp.float32


@RENORMALISE
def test_huge_logits_give_finite_gates_and_gradients(renormalise):
    # Catches exp(z) without subtracting the maximum: a router that drifts to logits of 1e4 would end the run in NaN.
    z = logits_of(scale=1e4)
    grad = jax.jit(jax.grad(lambda z: jnp.sum(route(z, X, renormalise=renormalise)[0] ** 2)))(z)
    assert np.isfinite(route(z, X, renormalise=renormalise)[0]).all() and np.isfinite(grad).all()


@RENORMALISE
@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32])
def test_given_routes_fix_the_experts_and_current_logits_their_gates(renormalise, dtype):
    # Catches gates recorded with the routes, a top-k among the given experts, and free choices that report the given
    # ones.
    z, rng = logits_of(1), np.random.default_rng(2)
    given = np.stack([rng.permutation(E)[:X] for _ in range(M)]).astype(dtype)
    gates, used, free = route(z, X, renormalise=renormalise, given_MX=given)
    np.testing.assert_array_equal(used, given)
    for m in range(M):
        np.testing.assert_allclose(gates[m], oracle.gates_of(z[m].astype(np.float64), given[m], renormalise), rtol=1e-5)
        np.testing.assert_array_equal(free[m], oracle.top_k(z[m], X))


@RENORMALISE
def test_a_token_with_minus_one_routes_freely_and_the_others_do_not(renormalise):
    # Catches -1 read as the last expert or as expert 0, and one unrecorded token that frees the whole batch.
    z = logits_of(3)
    given = np.full((M, X), -1, np.int8)
    given[2] = [4, 0]
    given[4] = [3, -1]  # half a record is none
    gates, used, free = route(z, X, renormalise=renormalise, given_MX=given)
    expected_gates, expected, _ = route(z, X, renormalise=renormalise)
    rest = [m for m in range(M) if m != 2]
    np.testing.assert_array_equal(used[np.array(rest)], expected[np.array(rest)])
    np.testing.assert_array_equal(gates[np.array(rest)], expected_gates[np.array(rest)])
    np.testing.assert_array_equal(used[2], [4, 0])
    np.testing.assert_array_equal(free, expected)


@RENORMALISE
def test_the_router_learns_under_replay_even_from_experts_it_would_no_longer_choose(renormalise):
    # Catches scores gathered after a mask: drifted experts then have gate 0 and the router gets no gradient from them.
    z = logits_of(4)
    given = np.argsort(z, axis=1)[:, :X].astype(np.int8)  # the least likely experts: all routes have drifted
    weight = np.random.default_rng(5).standard_normal((M, X))

    def loss(z):
        return jnp.sum(weight * route(z, X, renormalise=renormalise, given_MX=given)[0])

    def exact(z):
        return sum(weight[m] @ oracle.gates_of(z[m], given[m], renormalise) for m in range(M))

    gates, _, _ = route(z, X, renormalise=renormalise, given_MX=given)
    assert (np.asarray(gates) > 0).all()
    grad = np.asarray(jax.jit(jax.grad(loss))(z))
    for m, e in np.ndindex(M, E):
        step = np.zeros((M, E))
        step[m, e] = 1e-5
        expected = (exact(z + step) - exact(z - step)) / 2e-5
        assert grad[m, e] == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert (abs(grad[m, e]) > 1e-6) or (renormalise and e not in given[m])


@RENORMALISE
def test_a_sigmoid_router_chooses_by_score_and_bias_and_weighs_by_score_alone(renormalise):
    # Catches a bias that gets into the gates, a choice by logit and bias, a softmax over the chosen logits in place of
    # their scores, a scale that is renormalised away, and given routes that the bias overrules.
    z, rng = logits_of(16), np.random.default_rng(17)
    bias = np.array([0.8, -0.8, 0.3, 0.0, -0.2], np.float32)
    given = np.stack([rng.permutation(E)[:X] for _ in range(M)]).astype(np.int8)
    given[0] = -1

    def gates_at(z, given):
        return route(jax.nn.log_sigmoid(z), X, renormalise=renormalise, given_MX=given, bias_E=bias, scale=2.5)

    for routes in (None, given):
        gates, used, free = gates_at(z, routes)
        for m in range(M):
            chosen = oracle.top_k(1 / (1 + np.exp(-z[m].astype(np.float64))) + bias, X)
            np.testing.assert_array_equal(free[m], chosen)
            np.testing.assert_array_equal(used[m], chosen if routes is None or m == 0 else given[m])
            wanted = oracle.gates_of(z[m].astype(np.float64), used[m], renormalise, sigmoid=True, scale=2.5)
            np.testing.assert_allclose(gates[m], wanted, rtol=1e-5)
    assert any(set(oracle.top_k(z[m], X)) != set(np.asarray(free[m]).tolist()) for m in range(M)), "no bias decides"

    weight = rng.standard_normal((M, X))
    grad = np.asarray(jax.grad(lambda z: jnp.sum(weight * gates_at(z, given)[0]))(z))
    for m, e in np.ndindex(M, E):
        step = 1e-5 * np.eye(E)[e]
        used = np.asarray(gates_at(z, given)[1])[m]
        high, low = (oracle.gates_of(z[m] + s, used, renormalise, sigmoid=True, scale=2.5) for s in (step, -step))
        assert grad[m, e] == pytest.approx(weight[m] @ (np.array(high) - low) / 2e-5, rel=1e-3, abs=1e-6)


def test_router_logits_that_are_not_float32_are_refused():
    # Catches a router computed in bf16, whose rounding alone changes experts between sampler and learner.
    with pytest.raises(AssertionError):
        route(jnp.asarray(logits_of(), jnp.bfloat16), X, renormalise=True)


@pytest.mark.parametrize("experts", [6, 128, 300])
def test_experts_changed_equals_a_count_with_sets(experts):
    # Catches a comparison by position (a swapped order is no change), padding that counts as "unchanged", an int8 that
    # wraps.
    rng = np.random.default_rng(6)
    L, B, T, X = 3, 4, 7, 3
    dtype = route_dtype(experts)
    old = np.stack([rng.permutation(experts)[:X] for _ in range(L * B * T)]).reshape(L, B, T, X)
    old[0, 0, 0] = [experts - 1, 0, 1]
    new = np.where(rng.random((L, B, T, 1)) < 0.6, old[..., ::-1], old)  # reordered only
    drifted = rng.random((L, B, T)) < 0.2
    new[drifted, 0] = [next(e for e in range(experts) if e not in row) for row in new[drifted]]
    recorded_BT = rng.random((B, T)) < 0.8
    old = np.where(recorded_BT[None, :, :, None], old, -1)
    mask_BT = rng.random((B, T)) < 0.7
    share, tokens = experts_changed(old.astype(dtype), new.astype(dtype), mask_BT)
    expected = oracle.count_changes(old, new, mask_BT)
    assert 0.02 < expected[0] < 0.3
    assert float(share.value) == pytest.approx(expected[0], rel=1e-6)
    assert float(tokens.value) == pytest.approx(expected[1], rel=1e-6)


def test_reordered_routes_have_not_changed_and_disjoint_ones_have_altogether():
    # Catches a measure with an offset or a factor: 0 and 1 are its ends.
    old = np.tile(np.array([0, 1], np.int8), (2, 1, 3, 1))
    mask = np.ones((1, 3), bool)
    assert [float(x.value) for x in experts_changed(old, old[..., ::-1], mask)] == [0, 0]
    assert [float(x.value) for x in experts_changed(old, old + 2, mask)] == [1, 1]
    assert [float(x.value) for x in experts_changed(old * 0 - 1, old, mask)] == [
        0,
        0,
    ]  # nothing recorded, nothing counted


@pytest.mark.parametrize("experts", [4, 128])
def test_load_equals_a_count(experts):
    # Catches padding that loads an expert, loads summed over layers before the spread is taken, ddof 1, -1 counted as
    # an expert.
    rng = np.random.default_rng(7)
    L, B, T, X = 2, 3, 8, 2
    routes = rng.integers(0, experts, (L, B, T, X)) % rng.integers(1, experts + 1, (L, 1, 1, 1))
    routes[:, 0, 0] = -1
    mask_BT = rng.random((B, T)) < 0.6
    measured = [x.mean() for x in load_by_layer(routes.astype(route_dtype(experts)), mask_BT, experts)]
    np.testing.assert_allclose(measured, oracle.count_load(routes, mask_BT, experts), rtol=1e-5)


@pytest.mark.parametrize(("experts", "dtype"), [(1, jnp.int8), (128, jnp.int8), (129, jnp.int16), (300, jnp.int16)])
def test_routes_are_stored_in_the_smallest_type_that_holds_them_and_minus_one(experts, dtype):
    # Catches an unsigned type, which has no -1, and an int8 for 129 experts, whose last index would be -128.
    assert route_dtype(experts) == dtype
    assert jnp.iinfo(route_dtype(experts)).max >= experts - 1 and jnp.iinfo(route_dtype(experts)).min <= -1


@pytest.mark.parametrize("k", [1, 2, 5])
def test_the_margin_is_the_distance_from_the_last_chosen_expert_to_the_next(k):
    # Catches a distance to the first choice, or between the chosen ones. With k = E there is no next.
    z = logits_of(9)
    falling = -np.sort(-z, axis=1)
    expected = falling[:, k - 1] - falling[:, k] if k < E else np.zeros(M)
    np.testing.assert_allclose(router_margin(z, k), expected, rtol=1e-6)


def test_the_router_kl_is_that_of_the_old_softmax_to_the_new_one():
    # Catches the two swapped, and a KL over the chosen experts alone. It is 0 for logits that differ by a constant.
    old, new = logits_of(10), logits_of(11)
    expected = []
    for m in range(M):
        p, q = oracle.softmax(old[m].astype(np.float64)), oracle.softmax(new[m].astype(np.float64))
        expected.append(sum(p[e] * np.log(p[e] / q[e]) for e in range(E)))
    np.testing.assert_allclose(router_kl(old, new), expected, rtol=1e-5)
    np.testing.assert_allclose(router_kl(old, old + 3), 0, atol=1e-6)


def test_means_by_layer_count_masked_tokens_only():
    # Catches padding in a mean, or NaN under it that gets out, and an average over layers.
    rng = np.random.default_rng(12)
    x, mask = rng.standard_normal((3, 2, 4)).astype(np.float32), rng.random((2, 4)) < 0.6
    expected = [np.mean([x[l, b, t] for b, t in np.ndindex(2, 4) if mask[b, t]]) for l in range(3)]
    np.testing.assert_allclose(by_layer(np.where(mask, x, np.nan), mask), expected, rtol=1e-5)


def test_the_share_of_variance_is_a_sum_of_squares_around_the_common_mean():
    # Catches squares around each part's own mean, a share of tokens for a share of variance, NaN past the end of a row.
    rng = np.random.default_rng(14)
    x, part, mask = rng.standard_normal((3, 5)).astype(np.float32), rng.random((3, 5)) < 0.4, rng.random((3, 5)) < 0.7
    mean = np.mean(x[mask])
    expected = np.sum((x[mask & part] - mean) ** 2) / np.sum((x[mask] - mean) ** 2)
    assert float(variance_share(np.where(mask, x, np.nan), part, mask)) == pytest.approx(expected, rel=1e-5)
    assert float(variance_share(np.ones((3, 5), np.float32), part, mask)) == 0


def test_swapped_experts_are_others_at_the_rate_asked_for():
    # Catches a swap to an expert that runs already (it would run twice), a biased pick, and coins shared by all tokens.
    tokens, E, rate = 6000, 5, 0.3
    chosen = np.stack([np.random.default_rng(15).permutation(E)[:2] for _ in range(tokens)]).astype(np.int32)
    swapped = np.asarray(jax.jit(swap_experts, static_argnums=(2, 3))(jax.random.key(0), chosen, E, rate))
    np.testing.assert_array_equal(swapped[:, 0], chosen[:, 0])
    assert (swapped[:, 0] != swapped[:, 1]).all()
    moved = swapped[:, 1] != chosen[:, 1]
    assert moved.mean() == pytest.approx(rate, abs=0.03)
    counts = np.bincount(swapped[moved, 1], minlength=E)
    others = [e for e in range(E) if e not in chosen[0]]
    assert counts[chosen[0]].sum() == 0 and counts[others].min() > 0.28 * moved.sum()


def test_tokens_are_routed_one_by_one():
    # Catches a softmax or a top-k over the tokens of a batch: a token's experts may not depend on its neighbours.
    z = logits_of(8)
    whole = route(z, X, renormalise=True)
    for m in range(M):
        for together, alone in zip(whole, route(z[m : m + 1], X, renormalise=True), strict=True):
            np.testing.assert_allclose(together[m], alone[0], rtol=1e-6)


def test_router_losses_equal_loops_over_rows():
    # Catches an f summed over the batch (the loss would then depend on the micro-batch), padding that counts, a z-loss
    # without square.
    rng = np.random.default_rng(8)
    L, B, T, E, X = 2, 3, 5, 4, 2
    z = rng.normal(size=(L, B, T, E)).astype(np.float32)
    routes = np.argsort(-z, axis=-1)[..., :X]
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], bool)
    exact = z.astype(np.float64)
    rows = [oracle.router_losses(exact[:, b, mask[b]], routes[:, b, mask[b]]) for b in range(B)]
    balance, square = np.array(rows).T
    np.testing.assert_allclose(balance_loss(z, routes, mask), balance, rtol=1e-5)
    np.testing.assert_allclose(z_loss(z, mask), square, rtol=1e-5)


def test_an_even_load_costs_1_and_a_single_expert_costs_e():
    # Catches a loss without the factor E, or divided by X twice.
    even = np.zeros((1, 1, 4, 4), np.float32)
    routes = np.array([[[[0], [1], [2], [3]]]])
    mask = np.ones((1, 4), bool)
    assert float(balance_loss(even, routes, mask)[0]) == pytest.approx(1)
    one = even + np.array([50, 0, 0, 0], np.float32)
    assert float(balance_loss(one, routes * 0, mask)[0]) == pytest.approx(4)
