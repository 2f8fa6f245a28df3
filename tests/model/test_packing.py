"""Groups packed behind their prompts: the same numbers as whole frames, and the same gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspo.model.packing import Packing
from gspo.model.transformer import Transformer
from tests import model_oracle as oracle

DENSE, MOE = oracle.DENSE, oracle.MOE
P, C, G, LENGTHS = 4, 5, 3, (4, 2)
B, T = G * len(LENGTHS), P + C


def groups(seed=0):
    """Left-padded prompts, each in front of G completions: (tokens_BT, first_B)."""
    rng = np.random.default_rng(seed)
    prompt_QP, first_Q = oracle.left_padded([rng.integers(0, 11, n) for n in LENGTHS], P, rng, 11)
    tokens_BT = np.concatenate([np.repeat(prompt_QP, G, axis=0), rng.integers(0, 11, (B, C))], axis=1)
    return tokens_BT.astype(np.int32), np.repeat(first_Q, G)


def packed_run(spec):
    model, packing = Transformer(spec), Packing(P, G)

    @jax.jit
    def run(params, tokens_BT, first_B, routes_LBTX=None):
        routes = None if routes_LBTX is None else packing.pack(routes_LBTX, 1)
        out = model.apply({"params": params}, packing.pack(tokens_BT), first_B[::G], routes, packing=packing)
        logits = model.apply({"params": params}, packing.unpack(out.hidden_BTD), method="logits")
        routers = (None if x is None else packing.unpack(x, 1) for x in (out.free_routes_LBTX, out.router_logits_LBTE))
        return out, logits, *routers

    return run


def test_packing_lays_completions_in_order_behind_the_first_copy_of_their_prompt():
    # Catches completions of another group, a transpose of completions and columns, and an axis that is not the rows'.
    x = np.arange(2 * B * T).reshape(2, B, T)
    packed = np.asarray(Packing(P, G).pack(jnp.asarray(x), 1))
    assert packed.shape == (2, B // G, P + G * C)
    for layer, q in np.ndindex(2, B // G):
        rows = x[layer, q * G : (q + 1) * G]
        np.testing.assert_array_equal(packed[layer, q], [*rows[0, :P], *rows[:, P:].reshape(-1)])


def test_unpacking_is_the_inverse_where_prompts_agree():
    # Catches completions behind another group's prompt.
    tokens_BT, _ = groups()
    x = jnp.asarray(np.stack([tokens_BT, 10 - tokens_BT]))
    np.testing.assert_array_equal(Packing(P, G).unpack(Packing(P, G).pack(x, 1), 1), x)
    np.testing.assert_array_equal(Packing(P, G).unpack(Packing(P, G).pack(x[0])), x[0])


def test_what_predicts_a_completion_is_the_prompt_s_last_column_and_all_of_its_own_but_the_last():
    # Catches log-probs shifted by a column, and the last column of the neighbour in the place of the prompt's.
    x_BT1 = jnp.arange(B * T).reshape(B, T, 1)
    shared = x_BT1.at[:, :P].set(x_BT1[::G, :P].repeat(G, axis=0))
    predicting = Packing(P, G).predicting(Packing(P, G).pack(shared))
    np.testing.assert_array_equal(predicting, shared[:, P - 1 : T - 1])


@pytest.mark.parametrize(
    "spec",
    [DENSE, MOE, dataclasses.replace(MOE, attention_chunk=2), dataclasses.replace(MOE, scan_layers=True, remat=True)],
    ids=["dense", "moe", "chunked", "scanned-remat"],
)
@pytest.mark.parametrize("replay", [False, True], ids=["free", "replay"])
def test_packed_rows_give_the_logits_and_routes_of_whole_frames(spec, replay):
    # Catches a completion that sees its neighbours, or none of its prompt; positions that go on behind the neighbour;
    # padding of the prompt that is seen; a chunk of columns with the mask of another; routes of another completion.
    tokens_BT, first_B = groups(1)
    _, params = oracle.build(spec)
    routes = None
    if replay and spec.num_experts:
        rng = np.random.default_rng(2)
        routes = np.stack([rng.permutation(5)[:2] for _ in range(2 * B * T)]).reshape(2, B, T, 2).astype(np.int8)
        routes[:, :, P:][rng.random((2, B, C)) < 0.3] = -1
        routes[:, :, :P] = np.repeat(routes[:, ::G, :P], G, axis=1)
    out, logits_BTV = oracle.forward(dataclasses.replace(spec, attention_chunk=0))(params, tokens_BT, first_B, routes)
    _, packed_BTV, free_LBTX, router_LBTE = packed_run(spec)(params, tokens_BT, first_B, routes)
    real_BT = np.arange(T) >= first_B[:, None]
    np.testing.assert_allclose(packed_BTV[real_BT], logits_BTV[real_BT], rtol=1e-5, atol=1e-5)
    if spec.num_experts:
        np.testing.assert_array_equal(free_LBTX[:, real_BT], out.free_routes_LBTX[:, real_BT])
        np.testing.assert_allclose(router_LBTE[:, real_BT], out.router_logits_LBTE[:, real_BT], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", [DENSE, MOE], ids=["dense", "moe"])
def test_packed_rows_give_the_gradient_of_whole_frames(spec):
    # Catches a prompt whose gradient comes from one of its completions alone, or from each of them G times.
    tokens_BT, first_B = groups(3)
    model, params = oracle.build(spec)
    packing, weight = Packing(P, G), np.random.default_rng(4).standard_normal((B, C, 16)).astype(np.float32)

    def plain(params):
        return jnp.sum(weight * model.apply({"params": params}, tokens_BT, first_B).hidden_BTD[:, P - 1 : T - 1])

    def packed(params):
        out = model.apply({"params": params}, packing.pack(tokens_BT), first_B[::G], packing=packing)
        return jnp.sum(weight * packing.predicting(out.hidden_BTD))

    wanted, found = jax.jit(jax.grad(plain))(params), jax.jit(jax.grad(packed))(params)
    for (path, leaf), other in zip(jax.tree_util.tree_leaves_with_path(wanted), jax.tree.leaves(found), strict=True):
        scale = np.abs(leaf).max()
        np.testing.assert_allclose(other, leaf, atol=1e-5 * scale, err_msg=jax.tree_util.keystr(path))
