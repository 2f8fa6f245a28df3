"""GSPO on running sums, from the cold start of sft_running_sum.py.

Rollout  32 prompts x 8 completions of at most 16 tokens; 4 updates each, against the policy that sampled.
Clip     the paper's 3e-4 / 4e-4 on the length-normalised sequence ratio.
Cost     20 rollouts, about a minute on 2 CPU cores.
GRPO     --config.objective.preset=grpo (token ratios, 0.2 / 0.27).
"""

from configs import base


def get_config():
    return base.rl()
