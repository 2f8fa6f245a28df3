"""GSPO on SmolLM2-135M-Instruct and GSM8K, for one GPU.

Weights  as for gspo_smollm2.py, in runs/smollm2.
Task     tfds gsm8k, prepared (TFDS_DATA_DIR, or config.task.options.data_dir), through the model's chat template. The
         number in the last \\boxed{}, else the last number of the completion counts: the model was never shown "####".
Rollout  64 prompts x 8 completions of at most 256 tokens at temperature 1; 4 updates each. bfloat16, so that the
         learner gives the old log-probs.
Clip     the paper's 3e-4 / 4e-4.
Cost     100 rollouts; no GPU was at hand to measure them.
"""

from configs import base


def get_config():
    config = base.rl()
    config.init_from = "runs/smollm2"
    config.task.update(name="tfds:gsm8k", train_split="train", eval_split="test")
    config.task.options = {"answer_format": "free", "data_dir": ""}
    config.max_prompt_length = 256
    config.max_completion_length = 256
    config.overlong_prompts = "drop"
    config.prompt_buckets = (160,)
    config.model.update(dtype="bfloat16", remat=True)
    config.num_rollouts = 100
    config.num_prompts = 64
    config.num_generations = 8
    config.micro_batch_size = 64  # rows
    config.old_logps = "learner"
    config.optimizer.update(learning_rate=1e-6, warmup_steps=10)
    config.eval.update(every=25, num_prompts=200, num_generations_eval=4)
    config.checkpoint.update(every=25, keep_last=1)
    return config
