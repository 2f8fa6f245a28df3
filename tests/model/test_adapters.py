"""Low-rank adapters: the matrices that are chosen, the sum, its gradient, and that a run begins with its base."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import PartitionSpec

from gspo.model.adapters import LoRA, abstract_adapters, init_adapters, merge_into, merged_params
from gspo.model.transformer import Transformer, abstract_params
from gspo.parallel.sharding import Layout, make_mesh
from gspo.types import UserError, attached
from tests import model_oracle as oracle

ALL = "attention/, (mlp|moe)/"
MOE = dataclasses.replace(oracle.MOE, moe_backend="dense")  # the quickest to compile
TOKENS_BT, FIRST_B = jnp.array([[1, 5, 2, 7, 3], [0, 0, 4, 9, 6]]), jnp.array([0, 2])


def adapted(spec, targets=ALL, rank=3, alpha=6.0):
    """lora, base, adapters with an A and a B that are not 0."""
    lora, weights = LoRA(rank, alpha, targets), oracle.build(spec)[1]
    adapters, rng = abstract_adapters(lora, weights), np.random.default_rng(1)
    return lora, weights, jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32), adapters)


def summed(lora, weights, adapters):
    """{name: W + alpha / rank A B}, float64, matrix by matrix."""
    flat, factors = flatten_dict(oracle.float64(weights), sep="/"), flatten_dict(oracle.float64(adapters), sep="/")
    for name in {path.rpartition("/")[0] for path in factors}:
        a, b, w = factors[f"{name}/A"], factors[f"{name}/B"], flat[name].copy()
        for at in np.ndindex(w.shape[:-2]):
            w[at] += lora.alpha / lora.rank * sum(np.outer(a[at][:, r], b[at][r]) for r in range(lora.rank))
        flat[name] = w
    return flat


# ---------------------------------------------------------------------------------------------------- what is adapted


@pytest.mark.parametrize(("targets", "wanted"), [
    (ALL, "attention/query attention/key attention/value attention/out moe/gate moe/up moe/down"),
    ("attention", "attention/query attention/key attention/value attention/out"),
    ("moe", "moe/gate moe/up moe/down"),
    ("(query|value)$, router", "attention/query attention/value moe/router"),
], ids=str)  # fmt: skip
def test_patterns_choose_matrices_and_a_router_only_by_name(targets, wanted):
    # Catches a router that moves because its layer was named, and norms that "attention" finds ("attention_norm").
    found = LoRA(2, 4.0, targets).matrices(oracle.build(oracle.MOE)[1])
    assert found.keys() == {f"blocks/{name}" for name in wanted.split()}


@pytest.mark.parametrize(("fields", "message"), [
    ({"rank": -1}, r"lora\.rank=-1: must be >= 0"),
    ({"alpha": 0.0}, r"lora\.alpha=0\.0: must be positive"),
    ({"alpha": float("nan")}, r"lora\.alpha=nan: must be positive"),
    ({"targets": "attention/, ("}, r"lora\.targets: '\(' is no regular expression"),
    ({"targets": " , "}, r"lora\.targets=.*name at least one"),
    ({"targets": "attention/, experts"}, r"lora\.targets: 'experts' is in the name of no matrix; there are blocks/att"),
    ({"targets": "_norm"}, r"lora\.targets: '_norm' names blocks/.*norm/scale, which cannot be adapted"),
    ({"targets": "embedding"}, r"lora\.targets: 'embedding' names embedding, which cannot be adapted"),
], ids=str)  # fmt: skip
def test_a_mistake_is_one_line_that_names_the_field(fields, message):
    # Catches a typing mistake after which less is trained than was asked for, or nothing.
    with pytest.raises(UserError, match=f"^{message}") as error:
        LoRA(**{"rank": 2, "alpha": 4.0, "targets": ALL} | fields).matrices(oracle.build(oracle.MOE)[1])
    assert "\n" not in str(error.value)


def test_A_begins_as_in_peft_and_B_with_zeros():
    # Catches a start that is not the base, A of zeros (then nothing ever moves), the bound of another axis, and one
    # draw for all layers or experts.
    weights = oracle.build(oracle.MOE)[1]
    fresh = jax.jit(lambda weights: init_adapters(LoRA(64, 1.0, ALL), weights, jax.random.key(3)))(weights)
    flat = flatten_dict(fresh, sep="/")
    for name, leaf in flat.items():
        if name.endswith("B"):
            assert not leaf.any()
            continue
        bound = leaf.shape[-2] ** -0.5  # √3 · gain / √in, the gain of √5 being √(2 / 6)
        assert 0.95 * bound < float(jnp.abs(leaf).max()) <= bound
        rows = leaf.reshape(-1, *leaf.shape[-2:])
        assert len(np.unique(rows[:, 0, 0])) == len(rows)
    assert flat["blocks/moe/down/A"].shape == (2, 5, 10, 64) and flat["blocks/moe/down/B"].shape == (2, 5, 64, 16)
    assert flat["blocks/attention/out/A"].shape == (2, 24, 64)


@pytest.mark.skipif(jax.device_count() < 8, reason="eight devices, real or virtual")
def test_adapters_lie_as_their_matrices_do():
    # Catches adapters that are whole on every device, or cut along the rank.
    layout = Layout(make_mesh({"fsdp": 2, "expert": 2, "tensor": 2}))
    spec = dataclasses.replace(oracle.MOE, num_experts=4, num_heads=4, vocab_size=12)
    flat = flatten_dict(abstract_adapters(LoRA(3, 1.0, ALL), abstract_params(Transformer(spec), layout)), sep="/")
    wanted = {
        "attention/query/A": (None, ("fsdp", "expert"), None), "attention/query/B": (None, None, "tensor"),
        "moe/up/A": (None, "expert", "fsdp", None), "moe/up/B": (None, "expert", None, "tensor"),
        "moe/down/A": (None, "expert", "tensor", None), "moe/down/B": (None, "expert", None, "fsdp"),
    }  # fmt: skip
    for name, spec in wanted.items():
        assert flat[f"blocks/{name}"].sharding.spec == PartitionSpec(*spec), name


# ---------------------------------------------------------------------------------------------------- the sum


@pytest.mark.parametrize("spec", [oracle.DENSE, oracle.MOE], ids=["dense", "moe"])
def test_merged_matrices_are_W_plus_alpha_over_rank_A_B(spec):
    # Catches A and B the wrong way round, a scale of alpha alone, experts that share one product, a matrix left out.
    lora, weights, adapters = adapted(spec)
    want = summed(lora, weights, adapters)
    jitted = jax.jit(lambda params: merged_params(params, lora.scale))
    for merged in (jitted(attached(weights, adapters)), merge_into(jitted(weights), adapters, lora.scale)):
        flat = flatten_dict(merged, sep="/")
        assert flat.keys() == want.keys()
        for name, value in flat.items():
            np.testing.assert_allclose(value, want[name], rtol=0, atol=1e-6, err_msg=name)


def test_a_run_begins_with_its_base_bit_by_bit():
    # Catches a first rollout that is not of the base: an A B of rounding size, a matrix that is added twice.
    weights = oracle.build(oracle.MOE)[1]

    @jax.jit
    def merged(weights):
        return merged_params(attached(weights, init_adapters(LoRA(3, 6.0, ALL), weights, jax.random.key(0))), 2.0)

    jax.tree.map(np.testing.assert_array_equal, merged(weights), weights)


@pytest.mark.parametrize(
    "spec", [dataclasses.replace(oracle.DENSE, scan_layers=True), MOE], ids=["dense-scanned", "moe"]
)
def test_a_block_runs_its_merged_matrices(spec):
    # Catches adapters that the forward pass leaves out, or that meet another layer's matrix.
    lora, weights, adapters = adapted(spec)

    @jax.jit
    def logits(params):
        model = Transformer(spec, adapter_scale=lora.scale)
        out = model.apply({"params": params}, TOKENS_BT, FIRST_B)
        return model.apply({"params": params}, out.hidden_BTD, method="logits")

    with_adapters = attached(weights, adapters)
    trees = (weights, jax.jit(lambda params: merged_params(params, lora.scale))(with_adapters))
    base, merged = (oracle.forward(spec)(tree, TOKENS_BT, FIRST_B)[1] for tree in trees)
    np.testing.assert_allclose(logits(with_adapters), merged, rtol=0, atol=2e-5)
    assert float(jnp.abs(merged - base)[0].max()) > 0.1


@pytest.mark.parametrize("spec", [
    dataclasses.replace(MOE, scan_layers=True),
    pytest.param(oracle.DENSE, marks=pytest.mark.slow),
    pytest.param(dataclasses.replace(MOE, remat=True), marks=pytest.mark.slow),
], ids=["moe-scanned", "dense", "moe-remat"])  # fmt: skip
def test_the_gradient_of_adapters_is_that_of_the_matrix_by_the_chain_rule(spec):
    # Catches a scale that is missing backward, a gradient that stops at the sum, and one that a recomputed product
    # spoils.
    lora, weights, adapters = adapted(spec, ALL + (", router" if spec.num_experts else ""))

    def loss(model, params):
        out = model.apply({"params": params}, TOKENS_BT, FIRST_B)
        return jnp.sum(jnp.sin(model.apply({"params": params}, out.hidden_BTD, method="logits")[0]))

    with_adapters, alone = Transformer(spec, adapter_scale=lora.scale), Transformer(spec)
    found = jax.jit(jax.grad(lambda a: loss(with_adapters, attached(weights, a))))(adapters)
    merged = jax.jit(lambda params: merged_params(params, lora.scale))(attached(weights, adapters))
    whole = flatten_dict(oracle.float64(jax.jit(jax.grad(lambda w: loss(alone, w)))(merged)), sep="/")
    factors, found = (flatten_dict(oracle.float64(tree), sep="/") for tree in (adapters, found))
    assert found.keys() == factors.keys()
    for name in found:
        matrix, _, factor = name.rpartition("/")
        a, b, grad = factors[f"{matrix}/A"], factors[f"{matrix}/B"], whole[matrix]
        want = np.einsum("...ij,...rj->...ir", grad, b) if factor == "A" else np.einsum("...ir,...ij->...rj", a, grad)
        scale = max(np.abs(want).max(), 1e-3)
        np.testing.assert_allclose(found[name] / scale, lora.alpha / lora.rank * want / scale, rtol=0, atol=2e-5)
        assert np.abs(want).max() > 0, name
