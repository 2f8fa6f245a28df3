"""DPO on running sums: a cold start is moved from demonstrations with errors towards the answers that were preferred.

Task   that of the cold start: 12 digits, sums modulo 10.
Data   pairs of the toy: the right answer is preferred to a demonstration with at least one error.
Begin  --config.init_from=runs/cold, which is the reference too:
       python experiments/sft.py --config=configs/sft_running_sum.py --workdir=runs/cold
Cost   200 updates of 64 pairs, each with one more forward pass than an update of the cold start, for the reference.
Ends   with the share of held-out pairs in which the policy, measured from its reference, leans to the preferred text.
       How often it is then right: python experiments/evaluate.py --config=configs/sft_running_sum.py --workdir=runs/dpo
"""

from configs import base


def get_config():
    config = base.dpo()
    config.num_updates = 200
    config.optimizer.update(learning_rate=1e-3, schedule="cosine", warmup_steps=20)
    return config
