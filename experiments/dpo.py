"""Direct preference optimization of a policy:

    python experiments/dpo.py --config=configs/dpo_tiny.py --workdir=runs/dpo --config.init_from=runs/cold

Leaves calibration.md and calibration.png too, of the rewards that the policy stands for.
"""

from gspo import build, dpo
from gspo.parallel import distributed
from gspo.report.calibration import write_calibration
from gspo.run import cli


def main() -> None:
    flags = cli.FLAGS
    plan = build.dpo_plan(flags.config, flags.workdir)
    line = dpo.train(plan, flags.workdir, allow_changed_config=flags.allow_changed_config)
    if distributed.is_primary():
        write_calibration(line, flags.workdir)


if __name__ == "__main__":
    cli.define_flags()
    cli.run(main, needs="label_smoothing")
