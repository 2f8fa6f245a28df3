"""What a run costs on a TPU slice that is not there: compiles its steps ahead of time, and prints memory, FLOPs and
collectives.

    python scripts/aot_report.py --config=configs/gspo_qwen3_30b_a3b.py --topology=v5p:4x4x4
    python scripts/aot_report.py --config=configs/gspo_qwen3_30b_a3b.py --topology=v5e:8x8 --config.mesh.expert=4

Needs libtpu (pip install -e '.[aot]') and no TPU. Exit code 1 when a step does not fit, with its largest buffers, or
when another of the checks below the table fails.
"""

import json
from pathlib import Path

import jax
from absl import flags

from gspo import build
from gspo.report import aot
from gspo.report.verdicts import checks
from gspo.run import cli
from gspo.steps import describe_layout, make_layout


def main() -> int:
    plan, topology = build.rl_plan(cli.FLAGS.config), cli.FLAGS.topology
    layout = make_layout(plan.mesh, aot.devices_of(topology))
    print(
        f"{topology}: {describe_layout(plan.mesh, layout)}; jax {jax.__version__}, libtpu {aot.libtpu_version()}\n",
        flush=True,
    )
    costs = aot.report(plan, layout)
    print(aot.table(costs, topology))
    verdicts = checks(plan, layout, costs, topology)
    print("\n" + "\n".join(f"{'yes' if holds else 'NO '}  {text}" for holds, text in verdicts))
    if cli.FLAGS.json:
        Path(cli.FLAGS.json).write_text(json.dumps(aot.as_json(plan, layout, costs, topology), indent=1) + "\n")
    return 0 if all(holds for holds, _ in verdicts) else 1


if __name__ == "__main__":
    cli.define_flags(workdir=False)
    flags.DEFINE_string("topology", "", "A slice of TPUs, KIND:AxBxC: v5p:4x4x4, v5e:8x8, v6e:4x8.")
    flags.DEFINE_string("json", "", "File to write the numbers to.")
    cli.run(main, needs="num_rollouts")
