"""Trains the quickstart's task with every preset and draws one figure and one table of all of them.

python experiments/objectives.py --config=configs/objectives.py --workdir=runs/objectives

With several seeds (--config.seeds="(0, 1, 2)") a cell is their mean and range, and the figure has a thin line for each.
A spike is an update whose gradient norm, before clipping, is more than 3 times the median of the 10 rollouts before it.
"""

import statistics
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from gspo.parallel import distributed
from gspo.report import tables
from gspo.report.arms import train_arms
from gspo.report.plots import across_seeds, series
from gspo.run import cli

COLUMNS = ("preset", "pass@1 before", "pass@1 after", "best", "clipped tokens", "gradient spikes", "entropy, last 5")
SPIKE, WINDOW = 3.0, 10
BLUE, RED, GREY = "#0072B2", "#D55E00", "0.85"


def main() -> None:
    config, workdir = cli.FLAGS.config, Path(cli.FLAGS.workdir)
    folders = train_arms(config, workdir, allow_changed_config=cli.FLAGS.allow_changed_config)
    if not distributed.is_primary():
        return
    runs = {arm: [tables.lines_of(folder, "metrics.jsonl") for folder in seeds] for arm, seeds in folders.items()}
    rows = [row(arm, seeds) for arm, seeds in runs.items()]
    (workdir / "table.md").write_text(tables.markdown(rows, COLUMNS))
    draw(runs, workdir / "objectives.png")
    tables.show(rows, COLUMNS)


def row(arm: str, seeds: list[tables.Lines]) -> list[str]:
    """One row of the table, over the seeds of a preset; each is given by the lines of its metrics."""
    solved = [tables.before_and_after(lines, "eval/pass@1") for lines in seeds]
    best = [max(tables.values(lines, "eval/pass@1"), default=None) for lines in seeds]
    updates = [[line for line in lines if "loss" in line] for lines in seeds]
    return [
        arm,
        tables.cell([before for before, _ in solved], "{:.3f}"),
        tables.cell([after for _, after in solved], "{:.3f}"),
        tables.cell(best, "{:.3f}"),
        tables.cell([tables.mean(lines, "clip_ratio/tokens") for lines in updates], "{:.2%}"),
        tables.cell([spikes(tables.values(lines, "grad_norm/max")) for lines in updates], "{:g}"),
        tables.cell([tables.mean(lines[-5:], "entropy") for lines in updates], "{:.3f}"),
    ]


def spikes(norms: list[float]) -> int:
    """Rollouts whose largest gradient norm exceeds SPIKE times the median of the WINDOW before it."""
    return sum(norm > SPIKE * statistics.median(norms[i - WINDOW : i]) for i, norm in enumerate(norms) if i >= WINDOW)


def draw(runs: dict[str, list[tables.Lines]], out: Path) -> None:
    """Small multiples: training reward of each preset, the others behind it in grey, held-out pass@1 as dots."""
    columns = 5
    count = -(-len(runs) // columns)
    size = (2.3 * columns, 1.9 * count)
    figure, grid = plt.subplots(count, columns, figsize=size, sharex=True, sharey=True, layout="constrained")
    for axes in grid.flat[len(runs) :]:
        axes.set_visible(False)
    for axes, (arm, seeds) in zip(grid.flat, runs.items(), strict=False):
        for other in runs.values():
            draw_reward(axes, other, GREY, width=0.7)
        draw_reward(axes, seeds, BLUE, width=1.5)
        for lines in seeds:
            axes.plot(*series(lines, "eval/pass@1"), "o", color=RED, markersize=3.5, markeredgecolor="white", zorder=3)
        axes.set_title(arm, fontsize=9, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8, labelbottom=True)
        axes.set_ylim(0, 1)
    figure.supxlabel("Rollout", fontsize=9)
    figure.supylabel("Training reward (line), held-out pass@1 (dots)", fontsize=9)
    figure.savefig(out, dpi=200)
    plt.close(figure)


def draw_reward(axes: Axes, seeds: list[tables.Lines], color: str, width: float) -> None:
    """The mean over the seeds, and a thin line for each of them where there are several; grey ones lie behind."""
    curves = [series(lines, "reward/mean") for lines in seeds]
    behind = 1 if color == GREY else 2
    if len(curves) > 1:
        for steps, rewards in curves:
            axes.plot(steps, rewards, color=color, linewidth=width / 3, alpha=0.6, zorder=behind)
    steps, mean, _, _ = across_seeds(curves)
    axes.plot(steps, mean, color=color, linewidth=width, zorder=behind)


if __name__ == "__main__":
    cli.define_flags()
    cli.run(main, needs="arms")
