"""Preferences among what a cold start writes, by a judge who counts right digits.

Task   that of configs/sft_running_sum.py, whose run is named by --config.init_from.
Judge  the share of digits that are right: what is hidden from the reward model that learns from these pairs. A language
       model as the judge, asked to compare: --config.judge=model:runs/smollm2
Cost   2,560 prompts, two completions each: seconds.
"""

from configs import base


def get_config():
    config = base.labels()
    config.judge = "matching_characters"
    return config
