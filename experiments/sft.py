"""Supervised fine-tuning: python experiments/sft.py --config=configs/sft_running_sum.py --workdir=runs/cold"""

from gspo import build, sft
from gspo.run import cli


def main() -> None:
    flags = cli.FLAGS
    sft.train(
        build.sft_plan(flags.config, flags.workdir), flags.workdir, allow_changed_config=flags.allow_changed_config
    )


if __name__ == "__main__":
    cli.define_flags()
    cli.run(main, needs="num_updates")
