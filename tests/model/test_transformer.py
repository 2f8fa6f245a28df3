"""The whole decoder against a float64 loop; padding, cache, replay and remat must not change what it computes."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspo.model.transformer import Transformer
from tests import model_oracle as oracle

DENSE, MOE, FULL = oracle.DENSE, oracle.MOE, oracle.FULL
OLMOE = dataclasses.replace(
    MOE, norm_topk_prob=False, qk_norm_over="projection", num_kv_heads=1, tie_embeddings=True, moe_backend="dense"
)
LLAMA = dataclasses.replace(
    DENSE, qk_norm=False, tie_embeddings=False, num_kv_heads=4, rope_scaling=(8.0, 1.0, 4.0, 64.0)
)  # its three waves: one is kept, one interpolated, one slowed down
QWEN2_MOE = dataclasses.replace(MOE, norm_topk_prob=False, qk_norm=False, qkv_bias=True, d_shared=14, shared_gate=True)
BIASED = dataclasses.replace(DENSE, qk_norm=False, qkv_bias=True, out_bias=True)  # Qwen2, and Llama's attention_bias
DOTS1 = dataclasses.replace(MOE, router="sigmoid", routed_scale=2.5, d_shared=20)
MIXED = dataclasses.replace(MOE, num_layers=5, dense_layers=(0, 3), d_ff=12)
WIDTH = 9
SPECS = pytest.mark.parametrize("spec", [DENSE, MOE], ids=["dense", "moe"])


def frames(seed=0, lengths=(9, 6, 3)):
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, 11, n) for n in lengths]
    return rows, *oracle.left_padded(rows, WIDTH, rng, 11)


# ---------------------------------------------------------------- against the oracle


@pytest.mark.parametrize(
    "spec",
    [DENSE, LLAMA, MOE, OLMOE, FULL]
    + [pytest.param(spec, marks=pytest.mark.slow) for spec in (BIASED, QWEN2_MOE, DOTS1, MIXED)],
    ids=["dense", "llama", "moe", "olmoe", "full", "biased", "shared-expert", "sigmoid", "dense-between"],
)
def test_logits_and_routes_equal_the_float64_decoder_under_left_padding(spec):
    # Catches any slip in a formula: residuals, norms, scale of scores, gates, the order of layers, the tied head, wrong
    # positions.
    rows, tokens_BT, first_B = frames()
    _, params = oracle.build(spec)
    out, logits_BTV = oracle.forward(spec)(params, tokens_BT, first_B)
    exact = oracle.float64(params)
    for b, row in enumerate(rows):
        logits_TV, routes_LTX, router_LTE = oracle.decoder(exact, spec, row)
        np.testing.assert_allclose(logits_BTV[b, first_B[b] :], logits_TV, rtol=1e-5, atol=1e-5)
        if spec.num_experts:
            assert oracle.margins(exact, spec, router_LTE).min() > 1e-4, "a tie: choose another seed"
            np.testing.assert_array_equal(out.free_routes_LBTX[:, b, first_B[b] :], routes_LTX)
            np.testing.assert_allclose(out.router_logits_LBTE[:, b, first_B[b] :], router_LTE, rtol=1e-5, atol=1e-5)
    assert logits_BTV.dtype == jnp.float32
    assert (out.free_routes_LBTX is None) == (spec.num_experts == 0)


@pytest.mark.parametrize(
    "spec",
    [MOE, FULL] + [pytest.param(spec, marks=pytest.mark.slow) for spec in (QWEN2_MOE, DOTS1, MIXED)],
    ids=["moe", "full", "shared-expert", "sigmoid", "dense-between"],
)
def test_given_routes_run_in_their_own_layer_row_and_column(spec):
    # Catches replay that is shifted by a column, crossed between layers by the scan, or between rows; and -1 that
    # routes to expert 0. The gates are those of the current logits, in each kind of router.
    rows, tokens_BT, first_B = frames(1)
    _, params = oracle.build(spec)
    rng = np.random.default_rng(2)
    L = spec.moe_layers
    given = np.stack([rng.permutation(5)[:2] for _ in range(L * 3 * WIDTH)]).reshape(L, 3, WIDTH, 2).astype(np.int8)
    given[rng.random((L, 3, WIDTH)) < 0.3] = -1
    out, logits_BTV = oracle.forward(spec)(params, tokens_BT, first_B, given)
    exact = oracle.float64(params)
    for b, row in enumerate(rows):
        logits_TV, free_LTX, _ = oracle.decoder(exact, spec, row, given[:, b, first_B[b] :])
        np.testing.assert_allclose(logits_BTV[b, first_B[b] :], logits_TV, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(out.free_routes_LBTX[:, b, first_B[b] :], free_LTX)


@pytest.mark.parametrize(
    "spec",
    [dataclasses.replace(DENSE, remat=True), dataclasses.replace(MOE, remat=True)]
    + [
        pytest.param(s, marks=pytest.mark.slow)
        for s in (
            DENSE,
            MOE,
            LLAMA,
            BIASED,
            OLMOE,
            QWEN2_MOE,
            DOTS1,
            MIXED,
            FULL,
            dataclasses.replace(MOE, moe_backend="ragged", remat=True),
        )
    ],
    ids=lambda s: (
        f"{s.moe_backend if s.num_experts else 'mlp'}{'-remat' * s.remat}{'' if s.qk_norm else '-no-qk-norm'}"
    ),
)
def test_the_gradient_equals_finite_differences_of_the_float64_decoder(spec):
    # Catches a wrong hand-written gradient of an expert backend, a stop_gradient too many, a tied head that forgets one
    # of its ends, a remat that routes anew in its second forward pass, and a row of nothing but padding whose NaN
    # poisons every parameter.
    rows, tokens_BT, first_B = frames(3, lengths=(4, 2, 0))
    _, params = oracle.build(dataclasses.replace(spec, remat=False, moe_backend="blocked"))
    model, exact = Transformer(spec), oracle.float64(params)
    routes = [oracle.decoder(exact, spec, row)[1] for row in rows[:2]]  # held fixed: a choice has no derivative
    weight = np.random.default_rng(4).standard_normal((3, WIDTH, 11)).astype(np.float32)
    weight *= (np.arange(WIDTH) >= first_B[:, None])[..., None]

    def exact_loss(params):
        return sum(
            np.sum(weight[b, first_B[b] :] * oracle.decoder(params, spec, row, routes[b])[0])
            for b, row in enumerate(rows[:2])
        )

    def loss(params):
        out = model.apply({"params": params}, tokens_BT, first_B)
        return jnp.sum(weight * model.apply({"params": params}, out.hidden_BTD, method="logits"))

    assert ("remat" in str(jax.make_jaxpr(loss)(params))) == spec.remat
    leaves = jax.tree.leaves(jax.jit(jax.grad(loss))(params))
    checks = oracle.directional_derivatives(exact_loss, exact, np.random.default_rng(5))
    for (name, direction, expected), grad in zip(checks, leaves, strict=True):
        assert np.sum(np.asarray(grad, np.float64) * direction) == pytest.approx(expected, rel=1e-4, abs=1e-4), name


# ---------------------------------------------------------------- padding


@SPECS
def test_a_sequence_gives_the_same_logits_wherever_it_stands_in_its_frame(spec):
    # Catches attention to padding on the left or to junk on the right.
    rng = np.random.default_rng(6)
    sequence = rng.integers(0, 11, 5)
    tokens_BT = rng.integers(0, 11, (3, WIDTH)).astype(np.int32)
    first_B = np.array([0, 2, 4], np.int32)
    for b, first in enumerate(first_B):
        tokens_BT[b, first : first + 5] = sequence
    _, params = oracle.build(spec)
    _, logits_BTV = oracle.forward(spec)(params, tokens_BT, first_B)
    for b, first in enumerate(first_B):
        np.testing.assert_allclose(logits_BTV[b, first : first + 5], logits_BTV[0, :5], rtol=1e-5, atol=2e-6)


@SPECS
def test_the_tokens_under_the_padding_do_not_matter(spec):
    # Catches padding that is seen, or that takes an expert's room away from real tokens.
    _, tokens_BT, first_B = frames(7)
    other_BT = np.where(np.arange(WIDTH) < first_B[:, None], 10 - tokens_BT, tokens_BT)
    _, params = oracle.build(spec)
    run = oracle.forward(spec)
    for real_V, other_V in zip(run(params, tokens_BT, first_B)[1], run(params, other_BT, first_B)[1], strict=True):
        np.testing.assert_allclose(real_V[-3:], other_V[-3:], rtol=1e-6, atol=1e-6)


@SPECS
def test_a_row_of_nothing_but_padding_is_finite_and_leaves_the_others_alone(spec):
    # Catches the softmax over nothing. Its gradient is part of the finite-difference test above.
    _, tokens_BT, first_B = frames(8)
    _, params = oracle.build(spec)
    run = oracle.forward(spec)
    _, logits_BTV = run(params, tokens_BT, np.array([first_B[0], first_B[1], WIDTH], np.int32))
    assert np.isfinite(logits_BTV).all()
    expected_BTV = run(params, tokens_BT, first_B)[1]
    for b in range(2):
        np.testing.assert_allclose(logits_BTV[b, first_B[b] :], expected_BTV[b, first_B[b] :], rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- the key/value cache


@pytest.mark.parametrize(
    "spec",
    [DENSE, MOE, dataclasses.replace(MOE, scan_layers=True)]
    + [pytest.param(spec, marks=pytest.mark.slow) for spec in (FULL, dataclasses.replace(FULL, scan_layers=True))],
    ids=["dense", "moe", "moe-scanned", "full", "full-scanned"],
)
def test_prefill_and_decode_equal_the_full_forward_at_every_position(spec):
    # Catches a cache read one column late, RoPE positions that restart with the completion, attention to columns not
    # yet written, a layer that reads the cache of another.
    P, G = 4, 2
    _, tokens_BT, first_B = frames(9, lengths=(9, 7, 6, 6))
    tokens_BT[1::G, :P], first_B[1::G] = tokens_BT[::G, :P], first_B[::G]  # two completions to each of two prompts
    model, params = oracle.build(spec)
    full, logits_BTV = oracle.forward(spec)(params, tokens_BT, first_B)
    prefill = jax.jit(lambda *xs: model.apply({"params": params}, *xs, G, WIDTH - P, method="prefill"))
    decode = jax.jit(lambda *xs: model.apply({"params": params}, *xs, method="decode"))
    head = jax.jit(lambda hidden: model.apply({"params": params}, hidden, method="logits"))

    out, caches = prefill(tokens_BT[::G, :P], first_B[::G])
    assert len(caches) == (1 if spec.scanned else spec.num_layers)
    # What is not yet written must not be seen.
    names = ("k_LBKHC", "v_LBKCH") if spec.scanned else ("k_BKHC", "v_BKCH")
    caches = tuple(c.replace(**{name: getattr(c, name) + 50 for name in names}) for c in caches)
    found_BTV = np.repeat(head(out.hidden_BTD), G, axis=0)
    found = [np.repeat(out.free_routes_LBTX, G, axis=1)] if spec.num_experts else []
    seen_QP = np.arange(P) >= first_B[::G, None]
    for column in range(WIDTH - P):
        seen_1C = (np.arange(WIDTH - P) <= column)[None]
        position_B = P + column - first_B
        out, caches = decode(tokens_BT[:, P + column], position_B, seen_QP, seen_1C, caches, jnp.int32(column))
        found_BTV = np.concatenate([found_BTV, head(out.hidden_BTD)], axis=1)
        found += [out.free_routes_LBTX] if spec.num_experts else []
    real_BT = np.arange(WIDTH) >= first_B[:, None]
    np.testing.assert_allclose(found_BTV[real_BT], logits_BTV[real_BT], rtol=1e-5, atol=5e-6)
    if spec.num_experts:
        np.testing.assert_array_equal(np.concatenate(found, axis=2)[:, real_BT], full.free_routes_LBTX[:, real_BT])


@pytest.mark.parametrize("spec", [DENSE, MOE, pytest.param(FULL, marks=pytest.mark.slow)], ids=["dense", "moe", "full"])
def test_layers_in_a_loop_and_one_after_the_other_compute_the_same(spec):
    # Catches layers in another order, routes or caches of another layer, gradients of a layer that end in another.
    _, tokens_BT, first_B = frames(13)
    _, params = oracle.build(spec)
    weight = np.random.default_rng(14).standard_normal((3, WIDTH, 16)).astype(np.float32)

    def both(scan_layers):
        model = Transformer(dataclasses.replace(spec, scan_layers=scan_layers))

        def loss(params):
            out = model.apply({"params": params}, tokens_BT, first_B)
            return jnp.sum(weight * out.hidden_BTD), out

        jaxpr = str(jax.make_jaxpr(loss)(params))
        assert (f"length={2 if spec is FULL else spec.num_layers}" in jaxpr) == scan_layers
        return jax.jit(jax.grad(loss, has_aux=True))(params)

    (looped, out), (unrolled, other) = both(True), both(False)
    np.testing.assert_allclose(other.hidden_BTD, out.hidden_BTD, rtol=1e-5, atol=1e-6)
    for found, wanted in zip(jax.tree.leaves(unrolled), jax.tree.leaves(looped), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
    if spec.num_experts:
        np.testing.assert_array_equal(other.free_routes_LBTX, out.free_routes_LBTX)


# ---------------------------------------------------------------- replay, scan, remat, dtype


@pytest.mark.parametrize(
    ("backend", "remat"),
    [("blocked", True), ("ragged", False)]
    + [
        pytest.param(backend, remat, marks=pytest.mark.slow)
        for backend, remat in (("blocked", False), ("ragged", True), ("dense", False), ("dense", True))
    ],
)
def test_replay_with_unchanged_weights_changes_no_bit(backend, remat):
    # Catches gates that replay recorded values or a masked softmax instead of the current one, and routes misaligned by
    # scan or remat.
    spec = dataclasses.replace(MOE, moe_backend=backend, remat=remat)
    _, tokens_BT, first_B = frames(10)
    _, params = oracle.build(MOE)
    run = oracle.forward(spec)
    unrecorded = np.full((2, 3, WIDTH, 2), -1, np.int8)
    out, logits = run(params, tokens_BT, first_B, unrecorded)
    again, replayed = run(params, tokens_BT, first_B, out.free_routes_LBTX)
    np.testing.assert_array_equal(replayed, logits)
    np.testing.assert_array_equal(again.free_routes_LBTX, out.free_routes_LBTX)
    real_BT = np.arange(WIDTH) >= first_B[:, None]
    half = np.where(
        real_BT[None, :, :, None], out.free_routes_LBTX, -1
    )  # what a sampler records: nothing under the padding
    np.testing.assert_array_equal(run(params, tokens_BT, first_B, half)[1], logits)
    free, free_logits = run(params, tokens_BT, first_B)
    np.testing.assert_allclose(free_logits, logits, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(free.free_routes_LBTX, out.free_routes_LBTX)


@SPECS
def test_bfloat16_compute_is_finite_and_close_while_router_and_logits_stay_float32(spec):
    # Catches router logits rounded to bf16 (experts would flip), bf16 logits, a float32 cache.
    _, tokens_BT, first_B = frames(12, lengths=(9, 8, 7))
    _, params = oracle.build(spec)
    exact, exact_logits = oracle.forward(spec)(params, tokens_BT, first_B)
    half = dataclasses.replace(spec, dtype="bfloat16")
    out, logits = oracle.forward(half)(params, tokens_BT, first_B, exact.free_routes_LBTX)
    assert logits.dtype == jnp.float32 and out.hidden_BTD.dtype == jnp.bfloat16
    real_BT = np.arange(WIDTH) >= first_B[:, None]
    error = np.asarray(logits - exact_logits)[real_BT]
    assert np.isfinite(logits).all() and 1e-4 < np.abs(error).max() < 0.5 and np.sqrt(np.mean(error**2)) < 0.08
    if spec.num_experts:
        assert out.router_logits_LBTE.dtype == jnp.float32
        rounded = np.asarray(out.router_logits_LBTE.astype(jnp.bfloat16).astype(jnp.float32))
        assert (rounded != out.router_logits_LBTE).mean() > 0.9


# ---------------------------------------------------------------- parameters and specs


@pytest.mark.parametrize("spec", [DENSE, MOE, FULL], ids=["dense", "moe", "full"])
def test_parameters_are_stacked_by_layer_and_each_axis_has_a_name(spec):
    # Catches layers that share weights, a scan that is unrolled into copies, and an axis that sharding could never cut.
    boxed = jax.eval_shape(Transformer(spec).init_params, jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))
    for path, leaf in leaves:
        assert isinstance(leaf, nn.Partitioned) and len(leaf.names) == leaf.value.ndim, path
        assert leaf.value.dtype == jnp.float32
        if "blocks" in jax.tree_util.keystr(path):
            dense = "dense_blocks" in jax.tree_util.keystr(path)
            size = len(spec.dense_layers) if dense else spec.num_layers - len(spec.dense_layers)
            assert leaf.names[0] == "layers" and leaf.value.shape[0] == size
    assert ("head" in boxed) == (not spec.tie_embeddings)


def test_layers_start_from_different_weights():
    # Catches one random key for all layers, or for all experts: they would then learn the same thing for ever.
    params = nn.unbox(jax.jit(Transformer(MOE).init_params)(jax.random.key(0)))
    gate_LEDF = np.asarray(params["blocks"]["moe"]["gate"])
    flat = gate_LEDF.reshape(-1, gate_LEDF.shape[2] * gate_LEDF.shape[3])
    correlation = np.corrcoef(flat) - np.eye(len(flat))
    assert np.abs(correlation).max() < 0.5
    assert gate_LEDF.std() == pytest.approx(MOE.d_model**-0.5, rel=0.1)  # fan-in is D, not E·D
