"""How far routing drifts, and what replay mends: model and task of gspo_running_sum.py, observed closely.

Drift     GSPO, routed freely: experts changed per update and per rollout, router KL, margins, and the variance of token
          and of sequence log-ratios by length. 30 rollouts of 64 x 8, 4 updates each.
Mismatch  for each injection and each replay mode, 4 rollouts: sampler against learner before the first update, and the
          spread of log-ratios over the 4 updates.
Cost      about 8 minutes on 2 CPU cores.
"""

from ml_collections import ConfigDict

from configs import gspo_running_sum, sft_running_sum


def get_config():
    config = ConfigDict()
    config.cold_start = sft_running_sum.get_config()
    config.base = gspo_running_sum.get_config()
    config.base.num_rollouts = 30
    config.base.old_logps = "learner"
    config.base.log.router_kl = True
    config.base.eval.every = 10
    config.mismatch_rollouts = 4
    config.modes = ("disabled", "R2", "R3")
    config.injections = ConfigDict({  # name -> what is laid over base.mismatch
        "none": {},
        "bf16 parameters": {"params": "bfloat16"},
        "int8 parameters": {"params": "int8"},
        "router noise 0.1": {"router_noise": 0.1},
        "router noise 0.3": {"router_noise": 0.3},
        "swap 5% of experts": {"expert_swap": 0.05},
        "2 rollouts stale": {"stale_rollouts": 2},
    }, convert_dict=True, allow_dotted_keys=True)  # fmt: skip
    return config
