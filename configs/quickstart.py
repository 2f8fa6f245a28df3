"""The main comparison: one cold start on running sums, then GRPO and GSPO from it, on the same prompts with the same
keys.

Cold start  300 updates of 128 demonstrations, whose steps are wrong with probability 0.12 each: pass@1 of about 0.2.
Arms        60 rollouts of 64 prompts x 8 completions, 4 updates each, no KL term. The arms differ in the objective
            alone: token ratios clipped to 0.2 / 0.27, sequence ratios clipped to 3e-4 / 4e-4 (the paper's ranges).
Cost        about 4 minutes on 2 CPU cores, compilation included.
"""

from ml_collections import ConfigDict

from configs import gspo_running_sum, sft_running_sum


def get_config():
    config = ConfigDict()
    config.cold_start = sft_running_sum.get_config()
    config.base = gspo_running_sum.get_config()
    config.seeds = (0,)  # one run per arm and seed; the cold start is shared
    # Name of the arm -> what is laid over `base`.
    config.arms = ConfigDict({"GRPO": {"objective": {"preset": "grpo"}}, "GSPO": {"objective": {"preset": "gspo"}}})
    return config
