"""Imported models give what transformers' own give, and transformers reads what is exported."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspo.hf import folder as hf
from gspo.hf.families import read_config, spec_from_hf
from gspo.learning.sampler import make_sampler
from gspo.model.distribution import Sampling
from gspo.model.transformer import Transformer, abstract_params
from tests import model_oracle as oracle
from tests.hf_folders import assert_bit_equal, needs_transformers

LLAMA3 = dict(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64, rope_type="llama3"
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
SHAPE = dict(
    vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=256,
    bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip
MOE = dict(num_experts=6, num_experts_per_tok=2)

DEEPSEEK = dict(n_routed_experts=6, num_experts_per_tok=2, moe_intermediate_size=20, routed_scaling_factor=2.5)


def case(name, family, *, kv, tied=False, theta=100.0, scaling=None, slow=True, **fields):
    rope = dict(scaling or dict(rope_type="default")) | dict(rope_theta=theta)
    fields = SHAPE | dict(num_key_value_heads=kv, tie_word_embeddings=tied, rope_parameters=rope) | fields
    return pytest.param(family, tuple((key, json.dumps(value)) for key, value in fields.items()), id=name,
                        marks=[pytest.mark.slow] if slow else [])  # fmt: skip


Q, QM, MX, LL, OL, Q2, Q2M, D1, G4 = (
    "Qwen3",
    "Qwen3Moe",
    "Mixtral",
    "Llama",
    "Olmoe",
    "Qwen2",
    "Qwen2Moe",
    "Dots1",
    "Glm4Moe",
)
CASES = [
    case("qwen3-gqa2-untied-wide-head", Q, kv=2, head_dim=12, slow=False),
    case(
        "qwen3moe-gqa4-renormalised",
        QM,
        kv=1,
        head_dim=12,
        norm_topk_prob=True,
        moe_intermediate_size=20,
        **MOE,
        slow=False,
    ),
    case("mixtral-gqa2", MX, kv=2, num_local_experts=4, num_experts_per_tok=2, slow=False),
    case("llama3-gqa2-tied-scaled", LL, kv=2, tied=True, scaling=LLAMA3, slow=False),
    case("olmoe-gqa1-not-renormalised", OL, kv=4, norm_topk_prob=False, **MOE, slow=False),
    case("qwen2-gqa2-tied", Q2, kv=2, tied=True, slow=False),
    case("qwen2-gqa1-untied", Q2, kv=4),
    case("qwen3-yarn", Q, kv=2, head_dim=12, scaling=YARN | dict(beta_fast=4, beta_slow=0.5), slow=False),
    case("qwen2-yarn-mscale", Q2, kv=2, scaling=YARN | dict(mscale=2.0, mscale_all_dim=0.5, truncate=False)),
    case("llama-linear", LL, kv=2, scaling=dict(rope_type="linear", factor=4.0)),
    case("llama-biased", LL, kv=2, attention_bias=True),
    case("qwen3moe-biased", QM, kv=2, attention_bias=True, norm_topk_prob=True, moe_intermediate_size=20, **MOE),
    case("qwen2moe-gqa2", Q2M, kv=2, moe_intermediate_size=20, shared_expert_intermediate_size=28, **MOE, slow=False),
    case(
        "qwen2moe-unbiased-renormalised-tied",
        Q2M,
        kv=4,
        tied=True,
        qkv_bias=False,
        norm_topk_prob=True,
        moe_intermediate_size=20,
        shared_expert_intermediate_size=28,
        **MOE,
    ),
    case(
        "dots1-gqa2-dense-first",
        D1,
        kv=2,
        norm_topk_prob=True,
        n_shared_experts=2,
        first_k_dense_replace=1,
        **DEEPSEEK,
        slow=False,
    ),
    case(
        "qwen3moe-dense-between",
        QM,
        kv=2,
        norm_topk_prob=True,
        moe_intermediate_size=20,
        num_hidden_layers=4,
        decoder_sparse_step=2,
        mlp_only_layers=[3],
        **MOE,
    ),
    case(
        "qwen2moe-dense-between",
        Q2M,
        kv=2,
        moe_intermediate_size=20,
        shared_expert_intermediate_size=28,
        num_hidden_layers=3,
        mlp_only_layers=[1],
        **MOE,
        slow=False,
    ),
    case("glm4moe-gqa2-biased", G4, kv=2, head_dim=12, attention_bias=True, **DEEPSEEK, slow=False),
    case(
        "glm4moe-gqa1-qk-norm-quarter",
        G4,
        kv=4,
        use_qk_norm=True,
        partial_rotary_factor=0.25,
        n_shared_experts=2,
        first_k_dense_replace=0,
        **DEEPSEEK,
    ),
    case("dots1-gqa1-tied-biased", D1, kv=4, tied=True, attention_bias=True, n_shared_experts=1, **DEEPSEEK),
    case("qwen3-gqa1-tied", Q, kv=4, tied=True, head_dim=8, rms_norm_eps=1e-2),
    case("qwen3-gqa4-narrow-head", Q, kv=1, head_dim=4, theta=1e6),
    case(
        "qwen3moe-gqa1-not-renormalised-tied",
        QM,
        kv=4,
        tied=True,
        head_dim=4,
        norm_topk_prob=False,
        moe_intermediate_size=20,
        **MOE,
    ),
    case(
        "qwen3moe-gqa2-one-expert",
        QM,
        kv=2,
        norm_topk_prob=True,
        moe_intermediate_size=20,
        num_experts=6,
        num_experts_per_tok=1,
    ),
    case("mixtral-gqa1-tied", MX, kv=4, tied=True, num_local_experts=8, num_experts_per_tok=3),
    case(
        "mixtral-gqa4-wide-head", MX, kv=1, head_dim=12, num_local_experts=4, num_experts_per_tok=2, rms_norm_eps=1e-2
    ),
    case("llama2-gqa1-untied", LL, kv=4, theta=1e4),
    case("llama3-gqa4-wide-head-scaled", LL, kv=1, head_dim=12, scaling=LLAMA3, theta=1e4),
    case("olmoe-gqa2-renormalised", OL, kv=2, norm_topk_prob=True, **MOE),
    case("olmoe-gqa4-tied", OL, kv=1, tied=True, norm_topk_prob=False, **MOE),
]
all_cases = pytest.mark.parametrize(("family", "fields"), CASES)
FEW = "qwen3moe-gqa4-renormalised"  # of the default run, where every case would take too long
few_cases = pytest.mark.parametrize(
    ("family", "fields"),
    [pytest.param(*c.values, id=c.id, marks=[] if c.id == FEW else pytest.mark.slow) for c in CASES],
)


@functools.cache
def torch_model(family, fields):
    """transformers' own model with random weights; norm scales are not 1 and biases not 0, so that a forgotten one
    shows."""
    import torch
    import transformers

    config = getattr(transformers, f"{family}Config")(**{key: json.loads(value) for key, value in fields})
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, param in model.named_parameters():
            noise = torch.randn(param.shape, generator=generator)
            small = 0.2 * noise + (not name.endswith("bias"))
            param.copy_(small if param.ndim == 1 else noise * param.shape[-1] ** -0.5 * 1.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
    return model


@functools.cache
def imported(family, fields, folder: Path):
    """(spec, params) of transformers' model, through a folder that transformers wrote, in several shards."""
    torch_model(family, fields).save_pretrained(folder, max_shard_size="30KB")
    spec = spec_from_hf(read_config(folder), moe_backend="dense")
    return spec, hf.import_params(folder, spec, abstract_params(Transformer(spec)))


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    return functools.cache(lambda *case: tmp_path_factory.mktemp("transformers"))


def padded_prompts(lengths, width=24):
    rng = np.random.default_rng(0)
    return oracle.left_padded([rng.integers(0, 40, n) for n in lengths], width, rng, 40)


def torch_logits(model, tokens_BT, first_B):
    import torch

    mask_BT = np.arange(tokens_BT.shape[1]) >= first_B[:, None]
    positions_BT = np.maximum(np.cumsum(mask_BT, axis=1) - 1, 0)
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(tokens_BT).long(),
            attention_mask=torch.tensor(mask_BT).long(),
            position_ids=torch.tensor(positions_BT),
        )
    return out.logits.numpy(), mask_BT


@needs_transformers
@all_cases
def test_float32_logits_agree_with_transformers_under_left_padding(family, fields, folder_of):
    # Catches any difference of formula or layout: a kernel not transposed, gate and up exchanged, heads interleaved,
    # QK-norm after RoPE or over the wrong width, gates of the other kind of router, an unscaled frequency, the wrong
    # eps, theta or head width.
    spec, params = imported(family, fields, folder_of(family, fields))
    tokens_BT, first_B = padded_prompts((24, 17, 9, 1))
    expected, mask_BT = torch_logits(torch_model(family, fields), tokens_BT, first_B)
    _, logits = oracle.forward(spec)(params, tokens_BT, first_B)
    error, expected = np.abs(np.asarray(logits) - expected)[mask_BT], expected[mask_BT]
    assert np.std(expected) > 0.3, "the comparison is empty if all logits are small"
    assert error.max() < 2e-4
    assert np.linalg.norm(error) / np.linalg.norm(expected) < 1e-4
    assert (error <= 2e-4 + 1e-4 * np.abs(expected)).all()


@needs_transformers
@few_cases
def test_64_greedy_tokens_agree_with_transformers_token_by_token(family, fields, folder_of):
    # Catches a cache, a position or a mask that goes wrong with the length of the completion only.
    import torch

    spec, params = imported(family, fields, folder_of(family, fields))
    tokens_BT, first_B = padded_prompts((8, 5, 2), width=8)
    mask_BT = np.arange(8) >= first_B[:, None]
    out = torch_model(family, fields).generate(
        input_ids=torch.tensor(tokens_BT).long(), attention_mask=torch.tensor(mask_BT).long(), max_new_tokens=64,
        do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    sample = make_sampler(
        Transformer(spec),
        num_generations=1,
        max_completion_length=64,
        eos_ids=(-1,),
        pad_id=0,
        sampling=Sampling(temperature=0.0),
    )
    rollout = sample(params, jnp.asarray(tokens_BT), jnp.asarray(8 - first_B), jax.random.key(0))
    np.testing.assert_array_equal(rollout.tokens_BT[:, 8:], out.numpy()[:, 8:])


@needs_transformers
@few_cases
def test_transformers_loads_the_exported_folder_and_gives_the_same_logits(family, fields, folder_of, tmp_path):
    # Catches an export that only our own import understands: names, shapes, the index, a config.json that says
    # something else.
    import transformers

    spec, params = imported(family, fields, folder_of(family, fields))
    hf.export_params(params, spec, tmp_path / "out", shard_bytes=30_000, source=folder_of(family, fields))
    assert_bit_equal(hf.import_params(tmp_path / "out", spec, abstract_params(Transformer(spec))), params)
    model, info = getattr(transformers, f"{family}ForCausalLM").from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True, dtype="float32"
    )
    assert not any(info.values()), info
    tokens_BT, first_B = padded_prompts((24, 10))
    expected, mask_BT = torch_logits(torch_model(family, fields), tokens_BT, first_B)
    logits, _ = torch_logits(model.eval(), tokens_BT, first_B)
    np.testing.assert_array_equal(logits[mask_BT], expected[mask_BT])
