"""The main comparison in a few minutes: a Mixture of Experts on which GRPO fails where its routers move, and GSPO does
not.

Setting  B of configs/paper_cpu.py, its first 30 rollouts with one seed: running sums of 16 digits, 64 experts of which
         8 run, routers at 20 times the learning rate of the rest, 16 updates per rollout.
Arms     GRPO, GRPO with routing replay (R2), GSPO: from one cold start, on the same prompts with the same random keys.
Cost     about 5 minutes on 2 CPU cores, compilation included; half of it is the cold start.
"""

from configs import paper_cpu
from configs.paper import Paper, methods


def get_config():
    paper = Paper(paper_cpu.cold_start(), paper_cpu.rl())
    cold = paper.cold("fine", model=paper_cpu.FINE)
    both = methods(paper_cpu.GRPO, paper_cpu.GSPO)
    setting = paper_cpu.setting("B")
    arms = [paper.arm(f"B MoE {name}", cold, setting, both[name]) for name in ("GRPO", "GRPO+R2", "GSPO")]
    paper.figure("quickstart", (0,), arms)
    paper.config.base.num_rollouts = 30
    paper.config.base.log.tokens_every = 25  # what scripts/view.py shows
    paper.config.reference = "experiments/results/paper_cpu"  # whose seeds show what is ordinary
    return paper.config
