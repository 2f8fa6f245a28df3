"""GSPO on GSM8K, from the cold start of sft_gsm8k.py, at a size that 2 CPU cores can train.

Rollout  16 prompts x 8 completions of at most 128 tokens; 4 updates each. Reward 1 where the number after "####" is the
         answer.
Clip     2e-3 / 2.5e-3: completions of about 70 tokens, for which the paper's 3e-4 / 4e-4 would clip nearly everything.
Cost     20 rollouts, under 10 minutes on 2 CPU cores. At this size rewards stay small; see the README for what was
measured."""

from configs import base
from configs.sft_gsm8k import gsm8k


def get_config():
    config = gsm8k(base.rl())
    config.num_rollouts = 20
    config.num_prompts = 16
    config.num_generations = 8
    config.objective.epsilon = 2e-3
    config.objective.epsilon_high = 2.5e-3
    config.optimizer.learning_rate = 3e-4
    config.eval.update(every=0, num_generations_eval=8)
    config.log.samples_every = 5
    return config
