"""The ablation curves of the GSPO paper, with seeds, bands, controls and verdicts.

python experiments/paper.py --config=configs/paper_cpu.py --workdir=runs/paper

Runs all arms with all seeds side by side, one on each core, seed by seed; stopped and started again, it goes on.
--figures=curves_b,dose --arms='B MoE' --seeds=10,11 run a part. Results lie in --results (default WORKDIR/results),
where a finished run is known and not made again: curves/ARM.csv, runs.csv, the figures as PNG, PDF and CSV; runs.md,
what has run, arms.md, what each arm came to, and claims.md, the verdicts on experiments/paper_claims.py. --draw trains
nothing and makes these of what is there.
"""

import functools
import subprocess
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from configs import base
from experiments.paper_claims import CLAIMS
from experiments.paper_figures import draw_all
from gspo.report import campaign, evidence, tables
from gspo.report.arms import runs_of
from gspo.report.ledger import Ledger, figures_table
from gspo.run import cli
from gspo.types import UserError

flags.DEFINE_list("figures", [], "Only these figures of the config.")
flags.DEFINE_list("arms", [], "Only arms whose name holds one of these.")
flags.DEFINE_list("seeds", [], "Only these seeds.")
flags.DEFINE_bool("draw", False, "Train nothing: figures and verdicts of what is there.")
flags.DEFINE_string("results", "", "Folder of the results; default: WORKDIR/results.")


def main() -> None:
    asked = cli.FLAGS
    config, workdir = asked.config, Path(asked.workdir)
    ledger = Ledger(Path(asked.results or workdir / "results"), base.rl(), commit())
    if not asked.draw:
        train(config, workdir, ledger)
    conclude(config, ledger)


def train(config: ConfigDict, workdir: Path, ledger: Ledger) -> None:
    """All runs that were asked for and are not in the ledger."""
    asked = cli.FLAGS
    runs = runs_of(config, workdir, figures=asked.figures, arms=asked.arms, seeds=map(int, asked.seeds))
    missing = [run for run in runs if run.cold and not ledger.has(run)]
    needed = {run.folder for run in missing}
    for run in reversed(runs):  # what they begin with, and what that begins with
        needed |= {run.cold} if run.folder in needed else set()
    runs = [run for run in runs if run.folder in needed]
    for run in missing:
        if run.ended:  # and the ledger was lost, or is another
            ledger.add(run)
    options = {"allow_changed_config": asked.allow_changed_config}
    campaign.train_all(runs, workers=config.workers, ended=ledger.add, **options)


def conclude(config: ConfigDict, ledger: Ledger) -> None:
    """Figures and verdicts from what the ledger has. Raises UserError where it has nothing."""
    if not ledger.runs:
        raise UserError(f"--results={ledger.folder}: no run is recorded there yet; leave --draw out, or name another")
    curves = functools.cache(lambda arm: ledger.curves(config.same.get(arm, arm)))
    for figure in draw_all(curves, config, ledger.folder):
        print(f"figure: {figure}.png")
    known = {*config.arms, *config.same}
    verdicts = [evidence.verdict(claim, curves) for claim in CLAIMS if claim.weights.keys() <= known]
    (ledger.folder / "arms.md").write_text(tables.markdown(*evidence.arms_table(list(config.arms), curves)))
    (ledger.folder / "runs.md").write_text(tables.markdown(*figures_table(config, ledger)))
    rows, columns = evidence.claims_table(verdicts)
    (ledger.folder / "claims.md").write_text(tables.markdown(rows, columns))
    shown = [columns.index(name) for name in ("", "claim", "effect [interval]", "seeds", "verdict")]
    judged = [row for row, found in zip(rows, verdicts, strict=True) if found.word != "not run"]
    tables.show([[row[i] for i in shown] for row in judged], [columns[i] for i in shown])


def commit() -> str:
    """The commit of the code, with a + where files have changed since; "" outside of a repository."""
    told = subprocess.run(["git", "describe", "--always", "--dirty=+", "--exclude=*"], capture_output=True, text=True)
    return told.stdout.strip()


if __name__ == "__main__":
    cli.define_flags()
    cli.run(main, needs="figures")
