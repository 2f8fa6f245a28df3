"""FLOPs and bytes by hand, against loops over tokens and against the products of a traced program."""

import dataclasses

import jax
import pytest

from configs import benchmark
from gspo import build
from gspo.report import aot
from gspo.report.flops import Sizes, decode_bytes, forward_flops, phase_flops
from gspo.report.workload import Work

DENSE, MOE = (build.rl_plan(benchmark.get_config(name)).model.spec(1) for name in ("dense", "moe"))
SHARED = dataclasses.replace(MOE, d_shared=48, shared_gate=True)
SIZES = Sizes(prompts=3, group=4, prompt=5, completion=7, updates=2)


MIXED = dataclasses.replace(MOE, dense_layers=(0,), d_ff=48)


def token_flops(spec, columns):
    """One token in one layer that sees so many columns, product by product; of a dense one, with num_experts=0."""
    D, N, K, H, X = spec.d_model, spec.num_heads, spec.num_kv_heads, spec.head_width, spec.experts_per_token
    products = [(D, N * H), (D, K * H), (D, K * H), (N * H, D)]
    products += X * 2 * [(D, spec.d_expert)] + X * [(spec.d_expert, D)] if spec.num_experts else []
    products += 2 * [(D, spec.d_shared)] + [(spec.d_shared, D)] + [(D, 1)] * spec.shared_gate
    products += [(D, spec.num_experts)] if spec.num_experts else 2 * [(D, spec.d_ff)] + [(spec.d_ff, D)]
    return sum(2 * a * b for a, b in products) + 2 * N * 2 * H * columns


@pytest.mark.parametrize("spec", [DENSE, MOE, SHARED, MIXED], ids=["dense", "moe", "shared-expert", "mixed"])
@pytest.mark.parametrize("shared", [True, False])
def test_a_forward_pass_is_the_sum_over_its_tokens(spec, shared):
    # Catches attention counted on the whole frame, a prompt counted for each row of its group, a head on prompt tokens.
    Q, G, P, C, _ = SIZES
    if shared:
        seen = [t + 1 for _ in range(Q) for t in range(P)]
        seen += [P + t + 1 for _ in range(Q * G) for t in range(C - 1)]
    else:
        seen = [t + 1 for _ in range(Q * G) for t in range(P + C)]
    dense = dataclasses.replace(spec, num_experts=0, experts_per_token=0, d_shared=0, shared_gate=False, d_ff=48)
    layers = [dense if spec.stack_of(i) == "dense_blocks" else spec for i in range(spec.num_layers)]
    want = sum(token_flops(layer, s) for layer in layers for s in seen)
    want += Q * G * C * 2 * spec.d_model * spec.vocab_size
    assert forward_flops(spec, SIZES, shared=shared) == pytest.approx(want, rel=1e-12)


def test_a_backward_pass_is_twice_a_forward_one():
    # Catches an update counted as one pass, or once for each of its minibatches.
    phases = phase_flops(MOE, SIZES, shared=False)
    assert phases["update"] == 3 * phases["old_logps"]
    assert phases["rollout"] == phase_flops(MOE, SIZES, shared=True)["old_logps"] < phases["old_logps"]


def test_the_scorer_of_a_dense_model_makes_about_the_products_that_are_counted():
    # Catches a factor of two, a forgotten matrix, layers counted once: whole frames against the products in the jaxpr,
    # which sees all columns of the frame (no causal saving) or, where prompts are shared, fewer tokens.
    config = benchmark.get_config("tiny")
    config.mesh.data = 1
    config.model.update(num_experts=0, experts_per_token=0, d_expert=0, d_ff=32)
    work = Work(build.rl_plan(config))
    rows = work.written()
    jaxpr = jax.make_jaxpr(work.steps.scorer)(work.state.params, rows.tokens_BT, rows.prompt_lengths_B)
    made = aot.matmul_flops(jaxpr.jaxpr)
    counted = [forward_flops(work.spec, work.sizes(), shared=shared) for shared in (True, False)]
    assert 0.9 * min(counted) < made < 1.3 * max(counted)


def test_decoding_reads_weights_once_a_pass_and_the_cache_so_far():
    # Catches a prompt read for each row of its group, a cache that is full from the start, all experts read for one.
    one = Sizes(prompts=1, group=1, prompt=5, completion=3, updates=1)
    D, K, H, L = DENSE.d_model, DENSE.num_kv_heads, DENSE.head_width, DENSE.num_layers
    weights = L * (D * (DENSE.num_heads + 2 * K) * H + DENSE.num_heads * H * D + 3 * D * DENSE.d_ff)
    weights += D * DENSE.vocab_size
    cache = L * 2 * K * H * ((5 + 1) + (5 + 2))
    assert decode_bytes(DENSE, one) == 4 * (2 * weights + cache)
    assert decode_bytes(DENSE, one._replace(group=9)) - decode_bytes(DENSE, one) == 4 * L * 2 * K * H * 8 * (1 + 2)
    few, many = (decode_bytes(MOE, one._replace(group=n)) for n in (1, 1000))
    expert = 3 * MOE.d_model * MOE.d_expert
    grown = many - few - 4 * L * 2 * K * H * 999 * (1 + 2)
    assert grown == pytest.approx(4 * 2 * L * expert * (MOE.num_experts - MOE.experts_per_token))
