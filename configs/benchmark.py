"""Work to be measured (scripts/benchmark.py), on random ids and random weights. configs/benchmark.py:VARIANT picks one.

    moe, dense   what the other systems are compared on: 8 prompts of 32 tokens, 8 completions of 64 tokens each, no end
                 tokens, old log-probs by the learner, 4 updates, float32, AdamW with clip 1.0 (scripts/benchmark_peers)
    mid          D 512, 8 layers, 16 experts of which 4 run: how close an update comes to the machine's matrix product
    long_prompt  as moe, prompts of 512 tokens: what it is worth to compute a prompt once per group
    vocab        as dense, 151,936 ids, 4 rows of 2,048 tokens: memory of the update
    mixed        as moe, 8 of 514 ids end a completion: lengths are about geometric, mean 64, at most 512. 32 prompts:
                 the 256 rows are to be several times those that max_num_seqs decodes at a time
    qwen3-1.7b, moe-150m, moe-500m   for a GPU: 8 x 8 rows of 512 tokens
    tiny         for tests

Cost: seconds to minutes; scripts/benchmark_cpu.sh and scripts/benchmark_gpu.sh run them all.
"""

from ml_collections import ConfigDict

from configs import base, models

MOE = dict(
    vocab_size=514, num_layers=4, d_model=128, num_heads=4, num_kv_heads=2, head_width=32, num_experts=8,
    experts_per_token=2, d_expert=128, d_ff=0, rope_theta=1e6,
)  # fmt: skip
DENSE = dict(MOE, num_experts=0, experts_per_token=0, d_expert=0, d_ff=256)
MID = dict(
    MOE, num_layers=8, d_model=512, num_heads=8, num_kv_heads=4, head_width=64, num_experts=16, experts_per_token=4,
    d_expert=512,
)  # fmt: skip
TINY = dict(
    MOE, vocab_size=34, num_layers=1, d_model=16, num_heads=2, num_kv_heads=1, head_width=8, d_expert=16,
    moe_backend="dense",
)  # fmt: skip
GPU = dict(max_prompt_length=256, max_completion_length=256, updates_per_rollout=1, micro_batch_size=16)

# Variant -> (fields of the model, fields of the run).
VARIANTS = {
    "moe": (MOE, {}),
    "dense": (DENSE, {}),
    "mid": (MID, dict(num_prompts=4, max_prompt_length=128, max_completion_length=128, updates_per_rollout=2)),
    "long_prompt": (MOE, dict(max_prompt_length=512)),
    "vocab": (
        dict(DENSE, vocab_size=151936),
        dict(num_prompts=1, num_generations=4, max_prompt_length=1024, max_completion_length=1024,
             updates_per_rollout=1),
    ),
    "mixed": (MOE, dict(num_prompts=32, max_completion_length=512)),
    "qwen3-1.7b": (models.model("qwen3-1.7b").to_dict(), GPU),
    "moe-150m": (dict(models.model("moe-150m").to_dict(), vocab_size=8192), GPU),
    "moe-500m": (dict(models.model("moe-500m").to_dict(), vocab_size=8192), GPU),
    "tiny": (TINY, dict(num_prompts=2, num_generations=4, updates_per_rollout=2, max_prompt_length=4,
                        max_completion_length=6)),
}  # fmt: skip


def get_config(variant="moe"):
    if variant not in VARIANTS:
        raise ValueError(f"no variant named {variant!r}; choose from {', '.join(VARIANTS)}")
    model, fields = VARIANTS[variant]
    config = base.rl()
    config.task.update(name="random_ids", options=ConfigDict(dict(num_end_ids=8 if variant == "mixed" else 0)))
    config.tokenizer = "bytes"  # nobody reads it: prompts are random ids of the model's vocabulary
    config.num_prompts, config.num_generations, config.updates_per_rollout = 8, 8, 4
    config.max_prompt_length, config.max_completion_length = 32, 64
    config.old_logps = "learner"
    config.optimizer.learning_rate = 1e-5
    config.model.update(model)
    config.update(fields)
    return config
