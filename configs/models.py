"""Published models and small ones: `model(name)` is what a config's `model` field takes.

    config.model = models.model("qwen3-0.6b")

Numbers are those of the published config.json files; `scripts/import_hf.py` prints the same for a folder of weights.
The full-size models compute in bfloat16, recompute activations in the backward pass, and use XLA's grouped matmul for
their experts."""

from ml_collections import ConfigDict

from configs import base

FULL_SIZE = dict(dtype="bfloat16", remat=True, moe_backend="ragged")
DENSE = dict(num_experts=0, experts_per_token=0, d_expert=0)
QWEN3 = dict(vocab_size=151936, head_width=128, rope_theta=1e6, rms_eps=1e-6, qk_norm=True, norm_topk_prob=True)
QWEN25 = (
    DENSE
    | FULL_SIZE
    | dict(vocab_size=151936, rope_theta=1e6, rms_eps=1e-6, qk_norm=False, qkv_bias=True, tie_embeddings=True)
)
SMALL = dict(head_width=64, rope_theta=1e4, qk_norm=True, tie_embeddings=True, dtype="bfloat16", moe_backend="ragged")

MODELS = {
    # Routed experts everywhere, vocabulary of the run's tokenizer. Sizes are counted with a vocabulary of 8,192.
    "toy": dict(),  # 4 layers, 8 experts of which 2 run: about 450k parameters
    "moe-30m": SMALL | dict(num_layers=6, d_model=256, num_heads=4, num_kv_heads=2, num_experts=16, experts_per_token=2,
                            d_expert=352),
    "moe-150m": SMALL | dict(num_layers=8, d_model=512, num_heads=8, num_kv_heads=2, num_experts=32,
                             experts_per_token=4, d_expert=352),
    "moe-500m": SMALL
    | dict(num_layers=12, d_model=768, num_heads=12, num_kv_heads=4, num_experts=64, experts_per_token=8, d_expert=264,
           remat=True),
    # Qwen3 (arXiv 2505.09388)
    "qwen3-0.6b": QWEN3 | DENSE | FULL_SIZE
    | dict(num_layers=28, d_model=1024, num_heads=16, num_kv_heads=8, d_ff=3072, tie_embeddings=True),
    "qwen3-1.7b": QWEN3 | DENSE | FULL_SIZE
    | dict(num_layers=28, d_model=2048, num_heads=16, num_kv_heads=8, d_ff=6144, tie_embeddings=True),
    "qwen3-4b": QWEN3 | DENSE | FULL_SIZE
    | dict(num_layers=36, d_model=2560, num_heads=32, num_kv_heads=8, d_ff=9728, tie_embeddings=True),
    "qwen3-8b": QWEN3 | DENSE | FULL_SIZE
    | dict(num_layers=36, d_model=4096, num_heads=32, num_kv_heads=8, d_ff=12288, tie_embeddings=False),
    "qwen3-30b-a3b": QWEN3 | FULL_SIZE
    | dict(num_layers=48, d_model=2048, num_heads=32, num_kv_heads=4, num_experts=128, experts_per_token=8,
           d_expert=768),
    "qwen3-235b-a22b": QWEN3 | FULL_SIZE
    | dict(num_layers=94, d_model=4096, num_heads=64, num_kv_heads=4, num_experts=128, experts_per_token=8,
           d_expert=1536),
    # Qwen2.5 (arXiv 2412.15115)
    "qwen2.5-0.5b": QWEN25 | dict(num_layers=24, d_model=896, num_heads=14, num_kv_heads=2, head_width=64, d_ff=4864),
    "qwen2.5-1.5b": QWEN25 | dict(num_layers=28, d_model=1536, num_heads=12, num_kv_heads=2, head_width=128, d_ff=8960),
    # Qwen1.5-MoE (arXiv 2407.10671)
    "qwen1.5-moe-a2.7b": FULL_SIZE
    | dict(vocab_size=151936, num_layers=24, d_model=2048, num_heads=16, num_kv_heads=16, head_width=128,
           num_experts=60, experts_per_token=4, d_expert=1408, norm_topk_prob=False, d_shared=5632, shared_gate=True,
           rope_theta=1e6, rms_eps=1e-6, qk_norm=False, qkv_bias=True),
    # Mixtral (arXiv 2401.04088)
    "mixtral-8x7b": FULL_SIZE
    | dict(vocab_size=32000, num_layers=32, d_model=4096, num_heads=32, num_kv_heads=8, head_width=128, num_experts=8,
           experts_per_token=2, d_expert=14336, rope_theta=1e6, rms_eps=1e-5, qk_norm=False),
    # Llama 3.2 (arXiv 2407.21783)
    "llama-3.2-1b": DENSE | FULL_SIZE
    | dict(vocab_size=128256, num_layers=16, d_model=2048, num_heads=32, num_kv_heads=8, head_width=64, d_ff=8192,
           rope_theta=5e5,
           rope_scaling=(32.0, 1.0, 4.0, 8192.0), rms_eps=1e-5, qk_norm=False, tie_embeddings=True),
    # OLMoE (arXiv 2409.02060)
    "olmoe-1b-7b": FULL_SIZE
    | dict(vocab_size=50304, num_layers=16, d_model=2048, num_heads=16, num_kv_heads=16, head_width=128, num_experts=64,
           experts_per_token=8, d_expert=1024, norm_topk_prob=False, rope_theta=1e4, rms_eps=1e-5,
           qk_norm_over="projection"),
}  # fmt: skip


def model(name: str) -> ConfigDict:
    """The `model` field of a config. Raises ValueError for a name that is not in MODELS."""
    if name not in MODELS:
        raise ValueError(f"no model named {name!r}; choose from {', '.join(MODELS)}")
    config = base.model()
    config.update(MODELS[name])
    return config
