"""A reward model from preferences:

    python experiments/reward_model.py --config=configs/reward_model_tiny.py --workdir=runs/rm

Leaves, beside the checkpoints, calibration.md and calibration.png: how often it was right on held-out pairs, by how
sure it was.
"""

from gspo import build, reward_model
from gspo.parallel import distributed
from gspo.report.calibration import write_calibration
from gspo.run import cli


def main() -> None:
    flags = cli.FLAGS
    plan = build.reward_model_plan(flags.config, flags.workdir)
    line = reward_model.train(plan, flags.workdir, allow_changed_config=flags.allow_changed_config)
    if distributed.is_primary():
        write_calibration(line, flags.workdir)


if __name__ == "__main__":
    cli.define_flags()
    cli.run(main, needs="center_rewards_coefficient")
