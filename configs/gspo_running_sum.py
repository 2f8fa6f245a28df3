"""GSPO on running sums, from the cold start of sft_running_sum.py.

Rollout  64 prompts x 8 completions of at most 16 tokens; 4 updates each, against the policy that sampled.
Clip     the paper's 3e-4 / 4e-4 on the length-normalised sequence ratio.
Rate     1e-3, warmed up over 20 updates (without, Adam's first steps undo part of the cold start) and falling to 0.
Cost     60 rollouts, about a minute on 2 CPU cores.
GRPO     --config.objective.preset=grpo (token ratios, 0.2 / 0.27).
"""

from configs import base


def get_config():
    config = base.rl()
    config.num_rollouts = 60
    config.num_prompts = 64
    config.optimizer.update(learning_rate=1e-3, schedule="linear", warmup_steps=20)
    return config
