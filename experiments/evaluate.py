"""Evaluates a checkpoint of a run on held-out prompts, by the config of the run: the latest, or --step=best, or
--step=120:

python experiments/evaluate.py --workdir=runs/gspo --config.eval.num_prompts=512
"""

import json
import sys
from pathlib import Path

from absl import flags

from gspo import build
from gspo.evaluate import evaluate_workdir
from gspo.parallel import distributed
from gspo.run import cli
from gspo.types import UserError

FROM_RUN = Path(__file__).parent.parent / "configs" / "from_run.py"


def main() -> None:
    config, workdir, step = cli.FLAGS.config, cli.FLAGS.workdir, cli.FLAGS.step
    if step not in ("", "best") and not step.isdecimal():
        raise UserError(f"--step={step}: give the number of a step, or best; leave it out for the latest")
    where = f"{Path(workdir)}@{step}" if step else workdir
    step, metrics, samples = evaluate_workdir(build.run_plan(config, workdir), where)
    if not distributed.is_primary():
        return
    for sample in samples[: config.log.num_samples]:
        print(json.dumps(sample, ensure_ascii=False))
    print(json.dumps({"step": step} | metrics))


def with_config(arguments: list[str]) -> list[str]:
    """The command line with the config that the run left in its folder, where none is given."""
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)  # --workdir=RUN, or --workdir RUN
    named = (
        a.partition("=")[2] if "=" in a else after for a, after in pairs if a.lstrip("-").partition("=")[0] == "workdir"
    )
    workdir = next(named, "")
    given = any(a.lstrip("-").partition("=")[0] == "config" for a in arguments)
    if given or not workdir or not (Path(workdir) / "config.json").is_file():
        return arguments
    return [f"--config={FROM_RUN}:{workdir}", *arguments]


if __name__ == "__main__":
    cli.define_flags()
    flags.DEFINE_string("step", "", "The checkpoint to evaluate: its number, or best; default: the latest.")
    sys.argv[1:] = with_config(sys.argv[1:])
    cli.run(main, needs="eval")
