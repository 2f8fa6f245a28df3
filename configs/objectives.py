"""Every preset of gspo.objectives on running sums of 12 digits, from one cold start, with what belongs to the method
outside its loss.

Cold start  that of sft_running_sum.py, shared by the seeds: pass@1 of about 0.2.
Arms        50 rollouts of 64 prompts x 8 completions, 4 updates each, as in gspo_running_sum.py. Clip ranges are the
            papers' own, also where they were chosen for much longer completions than the 13 tokens here.
Cost        about a minute an arm on 2 CPU cores.
"""

from ml_collections import ConfigDict

from configs import gspo_running_sum, sft_running_sum


def get_config():
    config = ConfigDict()
    config.cold_start = sft_running_sum.get_config()
    config.base = gspo_running_sum.get_config()
    config.base.num_rollouts = 50
    config.seeds = (0,)  # one run per arm and seed
    # Name of the arm -> what is laid over `base`.
    config.arms = ConfigDict({
        "GRPO": {"objective": {"preset": "grpo"}},
        "GSPO": {"objective": {"preset": "gspo"}},
        "GSPO-token": {"objective": {"preset": "gspo_token"}},
        "DAPO": {
            "objective": {"preset": "dapo"}, "filter_groups": {"enable": True}, "overlong_buffer": {"len": 2},
        },
        "Dr GRPO": {"objective": {"preset": "dr_grpo", "loss_norm_length": 16}, "scale_rewards": "none"},
        "CISPO": {"objective": {"preset": "cispo"}},
        "GMPO": {"objective": {"preset": "gmpo"}},
        "SAPO": {"objective": {"preset": "sapo"}},
        "LUSPO": {"objective": {"preset": "luspo"}},
        "RSPO": {"objective": {"preset": "rspo"}},
        "MiniRL": {"objective": {"preset": "minirl"}, "scale_rewards": "none"},
        "PPO": {"objective": {"preset": "ppo"}, "critic": {"enable": True}},
        "REINFORCE": {"objective": {"preset": "reinforce"}, "scale_rewards": "rloo"},
    })  # fmt: skip
    return config
