"""The lab on the paper's frozen setting: trains GRPO, GRPO+R2 and GSPO on B of configs/paper_cpu.py, 50 rollouts, every
tenth of them on record with the checkpoint before it, and asks of each what the other objectives would have done.

python experiments/lab.py --config=configs/lab_paper.py --workdir=runs/lab_paper

Seeds    10, 11, 12: the first three of the paper's. Cost: 12 runs of under a minute a core, then
         about ten minutes of one for the lab.
"""

from configs import lab, paper_cpu
from configs.paper import Paper, methods

SEEDS = (10, 11, 12)


def get_config():
    paper = Paper(paper_cpu.cold_start(), paper_cpu.rl())
    paper.config.base.log.tokens_every = 10
    paper.config.base.checkpoint.update(every=10, keep_last=10)
    # One device, in training and in the lab, whose updates are then the same bits (of two: log-probs within 2e-4).
    paper.config.base.mesh.data = 1
    cold = paper.cold("fine", model=paper_cpu.FINE)
    both, setting = methods(paper_cpu.GRPO, paper_cpu.GSPO), paper_cpu.setting("B")
    arms = [paper.arm(f"B MoE {name}", cold, setting, both[name]) for name in ("GRPO", "GRPO+R2", "GSPO")]
    paper.figure("lab", SEEDS, arms)
    for name, value in lab.get_config().items():
        paper.config[name] = value
    paper.config.objectives += ("reinforce",)  # without ratio and clip: which of the others has left the plain gradient
    paper.config.updates = (0, *range(1, 16, 2))  # a minibatch holds two prompts: few updates would say little
    return paper.config
