"""GSPO on Qwen3-30B-A3B, the size of the paper, for 64 TPU v5p chips (or as many GPUs of 80 GB).

Weights  scripts/import_hf.py --model-dir=FOLDER --out=runs/qwen3_30b_a3b --mesh=..., which also brings the tokenizer
         along.
Rollout  64 prompts of at most 512 tokens x 8 completions of at most 2,048; 4 updates each, against the policy that
         sampled.
Clip     the paper's 3e-4 / 4e-4 on the length-normalised sequence ratio; no KL term.
Layout   training: experts along `expert` (8), weights and optimizer along `fsdp` (8) too. Rollouts: 2 experts on each
         device, all else whole, so that no weight moves while tokens are drawn.
Memory   attention scores exist for 512 query columns at a time, logits for 128 columns, one row per device and pass.
Cost     scripts/aot_report.py compiles it without a TPU and says what it takes.
"""

from configs import base, models


def get_config():
    config = base.rl()
    config.init_from = "runs/qwen3_30b_a3b"
    config.tokenizer = "runs/qwen3_30b_a3b/hf"
    config.task.update(name="tfds:gsm8k", train_split="train", eval_split="test")
    config.task.options = {"answer_format": "hash", "data_dir": ""}
    config.model = models.model("qwen3-30b-a3b")
    config.model.attention_chunk = 512
    config.max_prompt_length = 512
    config.max_completion_length = 2048
    config.num_rollouts = 200
    config.num_prompts = 64
    config.num_generations = 8
    config.updates_per_rollout = 4
    config.micro_batch_size = 64
    config.old_logps = "learner"  # bfloat16: the sampler's own log-probs differ from them by rounding
    config.optimizer.update(learning_rate=1e-6, warmup_steps=20)
    config.mesh.update(data=1, fsdp=-1, expert=8, tensor=1)
    config.mesh_rules = "expert_fsdp"
    config.rollout_mesh_rules = "expert"
    config.rollout_expert_dispatch = (
        "all_to_all"  # groups of all devices: gathering would move every token to each of them
    )
    config.eval.update(every=20, num_prompts=256, num_generations_eval=4)
    config.checkpoint.every = 20
    return config
