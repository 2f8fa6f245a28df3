"""Evaluates the latest checkpoint of a run on held-out prompts:

python experiments/evaluate.py --config=configs/gspo_running_sum.py --workdir=runs/gspo --config.eval.num_prompts=512
"""

import json

from gspo import build
from gspo.evaluate import evaluate_workdir
from gspo.parallel import distributed
from gspo.run import cli


def main() -> None:
    config = cli.FLAGS.config
    step, metrics, samples = evaluate_workdir(build.run_plan(config), cli.FLAGS.workdir)
    if not distributed.is_primary():
        return
    for sample in samples[: config.log.num_samples]:
        print(json.dumps(sample, ensure_ascii=False))
    print(json.dumps({"step": step} | metrics))


if __name__ == "__main__":
    cli.define_flags()
    cli.run(main, needs="eval")
