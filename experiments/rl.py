"""Reinforcement learning, from a cold start that experiments/sft.py has left:

python experiments/rl.py --config=configs/gspo_running_sum.py --workdir=runs/gspo --config.init_from=runs/cold
"""

from gspo import build, rl
from gspo.run import cli


def main() -> None:
    flags = cli.FLAGS
    rl.train(build.rl_plan(flags.config, flags.workdir), flags.workdir, allow_changed_config=flags.allow_changed_config)


if __name__ == "__main__":
    cli.define_flags()
    cli.run(main, needs="num_rollouts")
