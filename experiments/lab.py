"""Asks of recorded rollouts what each objective would have done: gradients, clips, and the variance of log w.

python experiments/lab.py --config=configs/lab.py --workdir=runs/lab --config.rollouts=runs/gspo

The runs must have recorded their tokens (log.tokens_every) and kept the checkpoint before each such rollout. What is
computed: gspo/report/lab.py. Leaves in the workdir lab.csv (a line for each run, rollout, update, replay and
objective), table.md (means), and as PNG, PDF and CSV cosine (GRPO's gradient against GSPO's, and all against each
other), kinds (share of the squared norm by kind of layer) and variance (of log w: with replay and without, and the
share of tokens whose experts changed).

replay_error in lab.csv is the largest difference of a log-prob between the policy that the updates, made
again, end in and the one on record: it says how exactly the policies of training were met. configs/lab_paper.py trains
its runs first; --seeds=10,11: only these of them. What was measured is kept in WORKDIR/measured: stopped and started
again, the lab goes on.
"""

import json
import time
from functools import partial
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from configs import from_run
from experiments.lab_figures import draw, table_of
from gspo import build
from gspo.parallel import distributed
from gspo.plans import RLPlan
from gspo.report import arms, bands, lab, recorded, tables
from gspo.report.plots import short_names
from gspo.run import cli, machine
from gspo.types import UserError

flags.DEFINE_list("seeds", [], "Only these seeds, of a config that trains its runs.")
# Of the table, what a terminal has room for.
SHOWN = ("run", "replay", "objective", "grad_norm", "cosine/grpo", "share/routers", "clipped_tokens", "ess")
SHOWN += ("changed_share",)


def main() -> None:
    config, workdir = cli.FLAGS.config, Path(cli.FLAGS.workdir)
    asked = lab.Asked(tuple(config.objectives), config.epsilons.to_dict(), tuple(config.updates))
    asked.presets()  # a mistake in them, before anything is trained
    folders = trained(config, workdir) if "figures" in config else named(config)
    if not distributed.is_primary():
        return
    runs = [recorded.opened(name, folder, plan_of(folder)) for name, own in folders.items() for folder in own]
    for run in runs:
        asked.check(run)
    rows = measured(runs, asked, workdir / "measured")
    bands.write_csv(
        [{k: f"{v:.7g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows], workdir / "lab.csv"
    )
    cells, columns = table_of(rows)
    (workdir / "table.md").write_text(tables.markdown(cells, columns))
    draw(rows, workdir)
    narrow = [columns.index(name) for name in SHOWN if name in columns]
    tables.show([[row[i] for i in narrow] for row in cells], [columns[i] for i in narrow])
    print(f"numbers: {workdir / 'lab.csv'}   table: {workdir / 'table.md'}   figures: cosine, kinds, variance")


def trained(config: ConfigDict, workdir: Path) -> dict[str, list[Path]]:
    """Arm -> its folders, after training. Raises UserError."""
    options = {"allow_changed_config": cli.FLAGS.allow_changed_config}
    return arms.trained(config, workdir, map(int, cli.FLAGS.seeds), **options)


def named(config: ConfigDict) -> dict[str, list[Path]]:
    """The same of runs that are there, each by itself. The updates are made again as they were made, on as many devices
    of a CPU."""
    if cli.FLAGS.seeds:
        raise UserError("--seeds: the runs are those of config.rollouts; leave it out")
    folders = [Path(part.strip()) for part in config.rollouts.split(",") if part.strip()]
    if not folders:
        raise UserError("config.rollouts: name the workdir of a run that has recorded tokens, or several, with commas")
    machine.share_cores({rows for folder in folders for rows in build.rows_to_divide(config_of(folder))})
    return {name: [folder] for name, folder in zip(short_names(folders), folders, strict=True)}


def config_of(folder: Path) -> ConfigDict:
    """Raises UserError for what is no run."""
    if not (folder / "config.json").is_file():
        raise UserError(f"config.rollouts={folder}: it holds no config.json; name the --workdir of a run")
    written = json.loads((folder / "config.json").read_text())
    if "num_rollouts" not in written:
        raise UserError(f"config.rollouts={folder}: no run of experiments/rl.py; name one")
    own = from_run.get_config(str(folder))
    own.init_from = written["init_from"]
    return own


def plan_of(folder: Path) -> RLPlan:
    return build.rl_plan(config_of(folder), str(folder))


def measured(runs: list[recorded.RecordedRun], asked: lab.Asked, folder: Path) -> list[lab.Row]:
    """The rows of all rollouts. Those that are in the folder are not measured again."""
    programs, rows = lab.Programs(), []
    rollouts = [(run, rollout) for run in runs for rollout in run.files]
    for done, (run, rollout) in enumerate(rollouts, start=1):
        began, seed = time.perf_counter(), run.plan.seed
        rows += lab.measured_once(
            folder / f"{arms.slug(run.name)}.{seed}.{rollout}.json",
            asked.digest(run, rollout),
            partial(lab.rows_of_rollout, run, rollout, asked, programs),
        )
        told = f"{run.name}, seed {seed}, rollout {rollout}: {time.perf_counter() - began:.1f} s"
        print(f"{done}/{len(rollouts)}  {told}, replay error {rows[-1]['replay_error']:.1e}", flush=True)
    return rows


if __name__ == "__main__":
    cli.define_flags()
    cli.run(main, needs="rollouts")
