"""Several objectives from one cold start, on the same prompts with the same keys: a table, and a figure that shows
whether the run is an ordinary one.

python experiments/compare.py --config=configs/quickstart.py --workdir=runs/quickstart

Leaves in the workdir: cold/ and a folder for each arm and seed, table.md, curves.png. Run again, it goes on where it
was stopped. A cell without a number, "-", is of what the arm has not: a dense model changes no experts.
"""

import statistics
import time
from pathlib import Path

from configs import base
from gspo import rl
from gspo.parallel import distributed
from gspo.report import arms, bands, tables
from gspo.report.ledger import Curve, Ledger, curve_of
from gspo.run import cli, tokens

COLUMNS = (
    "arm",
    "pass@1 before",
    "pass@1 after",
    "clipped tokens",
    "experts changed per update",
    "experts changed per rollout",
    "s per rollout",
    "tokens/s",
)


def main() -> None:
    config, workdir = cli.FLAGS.config, Path(cli.FLAGS.workdir)
    start = time.perf_counter()
    folders = arms.trained(config, workdir, allow_changed_config=cli.FLAGS.allow_changed_config)
    if not distributed.is_primary():
        return
    rows = [row(arm, seeds) for arm, seeds in folders.items()]
    (workdir / "table.md").write_text(tables.markdown(rows, COLUMNS))
    ledger = Ledger(Path(config.reference), base.rl())
    own = {arm: [curve_of(folder) for folder in seeds] for arm, seeds in folders.items()}
    known = draw(own, ledger, workdir / "curves.png")
    tables.show(rows, COLUMNS)
    seconds = time.perf_counter() - start
    print(f"curves: {workdir / 'curves.png'}   table: {workdir / 'table.md'}   {seconds:.0f} s in all")
    recorded = [str(folder) for own in folders.values() for folder in own if tokens.files(folder)]
    if recorded:
        print(f"token by token: python scripts/view.py {' '.join(recorded)} --out=view.html")
    print(closing({len(seeds) for seeds in folders.values()}, known))


def closing(seeds: set[int], known: int) -> str:
    """What such a run can show, and what it cannot."""
    few = "One seed shows" if seeds == {1} else f"{min(seeds)} seeds show"
    return (
        f"{few} what can happen, not how often: arms of one seed differ by chance too. The shaded range is that\n"
        f"of {known} seeds with the same settings; verdicts with controls and intervals: experiments/README.md."
    )


def draw(own: dict[str, list[Curve]], ledger: Ledger, out: Path) -> int:
    """Reward of each arm in a panel, over the range of the seeds in the ledger; clipped tokens of all. Returns how many
    seeds there are."""
    figure, axes = bands.new_figure(1, len(own) + 1, width=3.0)
    known, colors = 0, bands.colors_of(own)
    for i, (panel, (arm, curves)) in enumerate(zip(axes, own.items(), strict=False)):
        before = ledger.curves(arm)
        known = max(known, len(before))
        bands.ordinary_panel(panel, dict(enumerate(curves)), before, "reward", arm, color=colors[arm])
        panel.set(ylim=(0, 1), ylabel="Training reward" if i == 0 else "")
    clipped = {arm: dict(enumerate(curves)) for arm, curves in own.items()}
    bands.curve_panel(axes[-1], clipped, "clipped", "Clipped tokens [%]", factor=100, log=True)
    bands.save(figure, axes, [], out)
    return known


def row(arm: str, folders: list[Path]) -> list[str]:
    """One row of the table: the mean over the arm's seeds, its range in brackets where there are several."""
    metrics = [tables.lines_of(folder, "metrics.jsonl") for folder in folders]
    timings = [tables.lines_of(folder, "timings.jsonl") for folder in folders]

    def over_seeds(name: str) -> str:
        return tables.cell([tables.mean(lines, name) for lines in metrics], "{:.2%}")

    solved = [tables.before_and_after(lines, "eval/pass@1") for lines in metrics]
    return [
        arm,
        tables.cell([before for before, _ in solved], "{:.3f}"),
        tables.cell([after for _, after in solved], "{:.3f}"),
        over_seeds("clip_ratio/tokens"),
        over_seeds("routing/experts_changed_per_update"),
        over_seeds("routing/experts_changed"),
        tables.cell([seconds_per_rollout(lines) for lines in timings], "{:.2f}"),
        tables.cell([median(tables.values(lines, "tokens_per_second")) for lines in timings], "{:,.0f}"),
    ]


def seconds_per_rollout(timings: tables.Lines) -> float | None:
    return median([sum(line[phase] for phase in rl.PHASES) for line in timings])


def median(numbers: list[float]) -> float | None:
    return statistics.median(numbers) if numbers else None


if __name__ == "__main__":
    cli.define_flags()
    cli.run(main, needs="figures")
