"""Tiny models of every family, and their folders as an export writes them."""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from gspo.hf import folder as hf
from gspo.model.spec import ModelSpec
from tests import model_oracle as oracle

needs_transformers = pytest.mark.skipif(
    not (importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")),
    reason="needs torch and transformers: pip install -e '.[hf-tests]'",
)

TINY = ModelSpec(
    vocab_size=40,
    num_layers=2,
    d_model=16,
    num_heads=4,
    num_kv_heads=2,
    head_width=6,
    d_ff=24,
    rope_theta=100.0,
    moe_backend="dense",
)
TINY_MOE = dataclasses.replace(TINY, d_ff=0, num_experts=4, experts_per_token=2, d_expert=10)
DENSE_FIRST = dict(num_layers=3, dense_layers=(0,), d_ff=18)
SPECS = {
    "Qwen3ForCausalLM": TINY,
    "Qwen3MoeForCausalLM": TINY_MOE,
    "MixtralForCausalLM": dataclasses.replace(TINY_MOE, qk_norm=False),
    "LlamaForCausalLM": dataclasses.replace(
        TINY, qk_norm=False, tie_embeddings=True, rope_scaling=(8.0, 1.0, 4.0, 64.0)
    ),
    "OlmoeForCausalLM": dataclasses.replace(TINY_MOE, qk_norm_over="projection", norm_topk_prob=False, head_width=4),
    "Qwen2ForCausalLM": dataclasses.replace(TINY, qk_norm=False, qkv_bias=True),
    "Qwen2MoeForCausalLM": dataclasses.replace(
        TINY_MOE, qk_norm=False, qkv_bias=True, norm_topk_prob=False, d_shared=14, shared_gate=True
    ),
    "Dots1ForCausalLM": dataclasses.replace(TINY_MOE, router="sigmoid", routed_scale=2.5, d_shared=20, **DENSE_FIRST),
    "Glm4MoeForCausalLM": dataclasses.replace(
        TINY_MOE, qk_norm=False, qkv_bias=True, router="sigmoid", d_shared=10, rotary_width=4, **DENSE_FIRST
    ),
}
all_families = pytest.mark.parametrize("family", SPECS)


def exported(folder: Path, family: str, **options):
    """(spec, params, folder) of random parameters, written by ours."""
    spec = SPECS[family]
    _, params = oracle.build(spec)
    hf.export_params(params, spec, folder, **options)
    return spec, params, folder


def assert_bit_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, g), w in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert (g.shape, g.dtype) == (w.shape, w.dtype), path
        assert np.asarray(g).tobytes() == np.asarray(w).tobytes(), path


def read_all(folder: Path) -> dict[str, np.ndarray]:
    return {name: x for file in folder.glob("*.safetensors") for name, x in safetensors.numpy.load_file(file).items()}
