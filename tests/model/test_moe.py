"""The ways of bringing tokens to experts: each against a loop, all against each other, in value and in every
gradient."""

import functools
import itertools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspo.model.experts import BACKENDS, block_size, blocked_experts, chosen_backend, looped_experts
from gspo.model.moe import MoE
from gspo.types import UserError
from tests import model_oracle as oracle

D, F = 6, 5
HERE = [name for name in BACKENDS if name != "tokamax"]  # an optional package
NAMES = ("h", "gates", "w_gate", "w_up", "w_down")


def inputs(M, E, X, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (M, D), (M, X), (E, D, F), (E, D, F), (E, F, D)
    h, gates, *weights = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return h, np.abs(gates), *weights, rng.standard_normal((M, D)).astype(np.float32)


def draw_experts(kind, M, E, X, seed=1):
    """[M, X] experts, different within a token."""
    rng = np.random.default_rng(seed)
    if kind == "first":  # one set of experts takes everything, the others are empty
        return np.tile(np.arange(X), (M, 1)).astype(np.int32)
    if kind == "last":
        return np.tile(np.arange(E - X, E), (M, 1)).astype(np.int32)
    if kind == "even":  # every expert gets M·X/E pairs
        return (np.arange(M * X).reshape(M, X) % E).astype(np.int32)
    return np.stack([rng.permutation(E)[:X] for _ in range(M)]).astype(np.int32)


@functools.cache
def value_and_grads(backend, **keywords):
    """Jitted (h, gates, w_gate, w_up, w_down, cotangent, experts) -> (output, gradients of all five)."""

    def weighted(h, gates, w_gate, w_up, w_down, weight, experts):
        y = BACKENDS[backend](h, gates, experts, w_gate, w_up, w_down, **keywords)
        return jnp.sum(y * weight), y

    return jax.jit(jax.value_and_grad(weighted, argnums=(0, 1, 2, 3, 4), has_aux=True))


def assert_backends_agree(M, E, X, kind, backends=("blocked", "looped", "ragged"), **keywords):
    *arrays, weight = inputs(M, E, X)
    experts = draw_experts(kind, M, E, X)
    (_, expected), grads = value_and_grads("dense")(*arrays, weight, experts)
    for backend in backends:
        (_, y), found = value_and_grads(backend, **keywords)(*arrays, weight, experts)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=2e-5, err_msg=f"{backend} {kind}")
        for name, one, other in zip(NAMES, found, grads, strict=True):
            np.testing.assert_allclose(
                one, other, rtol=1e-4, atol=1e-4, err_msg=f"gradient of {name}, {backend} {kind}"
            )


def loop(h, gates, w_gate, w_up, w_down, experts):
    y = np.zeros(h.shape)
    for m, x in np.ndindex(experts.shape):
        e = experts[m, x]
        y[m] += gates[m, x] * oracle.swiglu(h[m].astype(np.float64), w_gate[e], w_up[e], w_down[e])
    return y


@pytest.mark.parametrize("backend", HERE)
def test_every_backend_equals_the_loop_over_tokens(backend):
    # Catches swapped gate and up matrices, gates applied before the experts, a token that reads another token's slot.
    *arrays, weight = inputs(27, 6, 2)
    experts = draw_experts("random", 27, 6, 2)
    (_, y), _ = value_and_grads(backend)(*arrays, weight, experts)
    np.testing.assert_allclose(y, loop(*arrays, experts), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["random", "first", "last", "even"])
def test_backends_agree_in_value_and_all_gradients(kind):
    # Catches a capacity ("first", "last": two experts take all, four are empty) and a buffer that is one block short
    # ("even": 9 pairs for each expert, one more than a block of 8). 27 tokens fill no whole number of blocks.
    assert_backends_agree(27, 6, 2, kind)


@pytest.mark.parametrize("kind", ["random", "first", "last"])
def test_backends_agree_with_fewer_tokens_than_experts_and_one_expert_each(kind):
    # Catches slots counted per expert when most experts are empty, as in a decode step of a few rows.
    assert_backends_agree(3, 8, 1, kind)


def test_backends_agree_when_every_token_uses_every_expert():
    # Catches an off-by-one in top-k bookkeeping that only X = E shows.
    assert_backends_agree(5, 3, 3, "random")


@pytest.mark.slow
@pytest.mark.parametrize("block", [1, 4, 16, 64])
@pytest.mark.parametrize(("M", "E", "X"), [(1, 1, 1), (1, 4, 2), (17, 4, 2), (64, 4, 4), (130, 16, 3)])
def test_the_block_size_changes_nothing(M, E, X, block):
    # Catches a block size that some number of tokens does not fit.
    for kind in ("random", "first", "last", "even"):
        if not (kind == "even" and E % X and X > 1):
            assert_backends_agree(M, E, X, kind, backends=("blocked", "looped"), block=block)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_random_loads_fit_the_buffer(seed):
    # Catches a bound on the number of blocks that some load exceeds: its tokens would silently be dropped.
    rng = np.random.default_rng(seed)
    E, M = int(rng.integers(1, 9)), int(rng.integers(1, 40))
    experts = rng.choice(E, (M, 1), p=rng.dirichlet(np.full(E, 0.3))).astype(np.int32)
    *arrays, _ = inputs(M, E, 1, seed)
    for block, backend in itertools.product((1, 2, 5, 8), (blocked_experts, looped_experts)):
        y = backend(arrays[0], arrays[1], experts, *arrays[2:], block=block)
        np.testing.assert_allclose(y, loop(*arrays, experts), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", HERE)
def test_other_rows_do_not_change_a_token(backend):
    # Catches a capacity shared with padding, and pad rows whose slots overlap those of real tokens.
    *arrays, weight = inputs(27, 6, 2)
    experts = draw_experts("random", 27, 6, 2)
    (_, y), _ = value_and_grads(backend)(*arrays, weight, experts)
    arrays[0] = np.concatenate([arrays[0][:10], 100 * arrays[0][10:]])
    experts = np.concatenate([experts[:10], draw_experts("first", 17, 6, 2)])  # the rest floods two experts
    (_, flooded), _ = value_and_grads(backend)(*arrays, weight, experts)
    np.testing.assert_allclose(flooded[:10], y[:10], rtol=1e-6, atol=1e-6)
    assert np.abs(flooded[10:] - y[10:]).max() > 1


@pytest.mark.parametrize(
    ("pairs", "experts", "block"), [(1, 8, 8), (54, 6, 8), (6912, 8, 128), (512, 8, 32), (10**6, 128, 128)]
)
def test_a_block_holds_about_half_a_group_within_bounds(pairs, experts, block):
    # Catches blocks so large that a decode step of a few tokens multiplies mostly padding.
    assert block_size(pairs, experts) == block


def test_auto_loops_over_large_blocks_on_a_cpu_and_leaves_accelerators_their_kernels(monkeypatch):
    # Catches a loop of tiny products, one for each of many small experts, and a loop on a GPU.
    assert chosen_backend(2176, 8, 128, 128, "cpu") == "looped"
    assert chosen_backend(4352, 64, 64, 16, "cpu") == chosen_backend(128, 8, 128, 128, "cpu") == "blocked"
    assert chosen_backend(2176, 8, 128, 128, "tpu") == "ragged"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert chosen_backend(2176, 8, 128, 128, "gpu") == "blocked"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "tokamax")
    assert chosen_backend(2176, 8, 128, 128, "gpu") == "tokamax"


def test_tokamax_is_called_as_ragged_dot_is_and_named_where_it_is_missing(monkeypatch):
    # Catches an import that every other backend would need too, and a traceback for a package that is not there.
    *arrays, _ = inputs(27, 6, 2)
    experts = draw_experts("random", 27, 6, 2)
    monkeypatch.setitem(sys.modules, "tokamax", None)
    with pytest.raises(UserError, match=r"model.moe_backend='tokamax': the package is not installed"):
        BACKENDS["tokamax"](arrays[0], arrays[1], experts, *arrays[2:])
    monkeypatch.setitem(sys.modules, "tokamax", types.SimpleNamespace(ragged_dot=jax.lax.ragged_dot))
    y = BACKENDS["tokamax"](arrays[0], arrays[1], experts, *arrays[2:])
    np.testing.assert_allclose(y, loop(*arrays, experts), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "backend", ["blocked", "looped"] + [pytest.param(name, marks=pytest.mark.slow) for name in ("dense", "ragged")]
)
def test_under_replay_gradients_reach_the_router_and_exactly_the_experts_that_ran(backend):
    # Catches a stop_gradient around the gates, weights that get a gradient without having run, and replay that runs
    # free choices.
    moe = MoE(4, 2, F, True, backend, jnp.float32)
    x = np.random.default_rng(8).standard_normal((2, 3, D)).astype(np.float32)
    weights = inputs(1, 4, 1)[2:5]
    router = np.random.default_rng(9).standard_normal((D, 4)).astype(np.float32)
    params = {"router": router} | dict(zip(("gate", "up", "down"), weights, strict=True))
    given = np.broadcast_to(np.array([1, 3], np.int8), (2, 3, 2))

    @jax.jit
    def grads_of(params):
        def loss(params):
            y, free, logits = moe.apply({"params": params}, x, given)
            return jnp.sum(y**2), (free, logits)

        return jax.grad(loss, has_aux=True)(params)

    grads, (free, logits) = grads_of(params)
    assert (np.abs(grads["router"]).max(axis=0)[[1, 3]] > 1e-4).all()
    for name in ("gate", "up", "down"):
        ran = np.abs(grads[name]).max(axis=(1, 2)) > 0
        np.testing.assert_array_equal(ran, [False, True, False, True])
    for b, t in np.ndindex(2, 3):
        np.testing.assert_array_equal(free[b, t], oracle.top_k(np.asarray(logits[b, t]), 2))


def test_router_logits_are_float32_products_when_the_layer_computes_in_bfloat16():
    # Catches a router matmul in bf16: its logits are a few percent off, and near ties choose other experts.
    moe = MoE(4, 2, F, True, "blocked", jnp.bfloat16)
    x = jnp.asarray(np.random.default_rng(10).standard_normal((1, 5, 6)), jnp.bfloat16)
    router = np.random.default_rng(11).standard_normal((6, 4)).astype(np.float32)
    params = {"router": router} | dict(zip(("gate", "up", "down"), inputs(1, 4, 1)[2:5], strict=True))
    y, _, logits = jax.jit(lambda p: moe.apply({"params": p}, x))(params)
    assert logits.dtype == jnp.float32 and y.dtype == jnp.bfloat16
    np.testing.assert_allclose(logits[0], np.asarray(x[0], np.float64) @ router, rtol=1e-5, atol=1e-5)
