"""GSPO on Qwen3-235B-A22B, for 128 TPU v5p chips. As gspo_qwen3_30b_a3b.py, with 128 prompts: one row per device and
pass.

Layout   training: experts along `expert` (8), weights and optimizer along `fsdp` (16) too. Rollouts: one expert on each
         device.
Cost     scripts/aot_report.py --topology=v5p:4x4x8 says what it takes.
"""

from configs import gspo_qwen3_30b_a3b, models


def get_config():
    config = gspo_qwen3_30b_a3b.get_config()
    config.init_from = "runs/qwen3_235b_a22b"
    config.tokenizer = "runs/qwen3_235b_a22b/hf"
    config.model = models.model("qwen3-235b-a22b")
    config.model.attention_chunk = 512
    config.num_prompts = 128
    config.micro_batch_size = 128
    return config
