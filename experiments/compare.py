"""One cold start, then several objectives from it: same prompts, same keys, a closing table and a figure.

python experiments/compare.py --config=configs/quickstart.py --workdir=runs/quickstart

Leaves in the workdir: cold/ and one folder per arm and seed, table.md, curves.png. Run again, it resumes where it was
stopped. A cell without a number, "-", is of what the arm has not: a dense model changes no experts.
"""

import statistics
import time
from pathlib import Path

from gspo import rl
from gspo.parallel import distributed
from gspo.report import tables
from gspo.report.arms import train_arms
from gspo.report.plots import plot_curves
from gspo.run import cli

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
    folders = train_arms(config, workdir, allow_changed_config=cli.FLAGS.allow_changed_config)
    if not distributed.is_primary():
        return
    rows = [row(arm, seeds) for arm, seeds in folders.items()]
    (workdir / "table.md").write_text(tables.markdown(rows, COLUMNS))
    runs = [(arm, folder) for arm, seeds in folders.items() for folder in seeds]
    plot_curves([folder for _, folder in runs], [arm for arm, _ in runs], workdir / "curves.png")
    tables.show(rows, COLUMNS)
    seconds = time.perf_counter() - start
    print(f"curves: {workdir / 'curves.png'}   table: {workdir / 'table.md'}   {seconds:.0f} s in all")


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
    cli.run(main, needs="arms")
