"""Every preset of gspo.objectives on the quickstart's task, from one cold start, with what belongs to the method
outside its loss.

Cold start  as in quickstart.py.
Arms        as in quickstart.py, but 50 rollouts. Clip ranges are the papers' own, also where they were chosen for
            much longer completions than the 13 tokens here.
Cost        about a minute an arm on 2 CPU cores.
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config():
    config = quickstart.get_config()
    config.base.num_rollouts = 50
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
