"""A reward model for running sums: it learns from pairs which of two answers is right, and is never told the rule.

Task   4 random digits and "="; the answer is the 4 running sums modulo 2, as in "3141=" -> "1001".
Data   pairs of the toy: the right answer is preferred to that of a demonstrator who errs at every other step. So the
       hidden preference is known, and an accuracy of 1 can be reached. Data of your own:
       --config.task.name=jsonl:data/{split}.jsonl, lines {"prompt", "chosen", "rejected"} and perhaps "margin".
Model  4 layers, width 64, 8 experts of which 2 run, with one number per completion in place of logits.
Cost   300 updates of 64 pairs.
"""

from configs import base


def get_config():
    config = base.reward_model()
    config.task.options = {"num_digits": 4, "modulus": 2, "error_rate": 0.5, "size": 4_000}
    config.max_prompt_length = config.max_completion_length = 5
    config.num_updates = 300
    config.center_rewards_coefficient = 0.01
    config.optimizer.update(learning_rate=3e-3, schedule="cosine", warmup_steps=20)
    return config
