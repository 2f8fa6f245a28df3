"""Trains the quickstart's task with every preset and draws one figure and one table of all of them.

python experiments/objectives.py --config=configs/objectives.py --workdir=runs/objectives

A spike is an update whose gradient norm, before clipping, is more than 3 times the median of the 10 rollouts before it.
"""

import statistics
from pathlib import Path

import compare
import matplotlib.pyplot as plt

from gspo import build, rl, sft
from gspo.run import cli
from gspo.run.writers import read_jsonl

COLUMNS = ("preset", "pass@1 before", "pass@1 after", "best", "clipped tokens", "gradient spikes", "entropy, last 5")
SPIKE, WINDOW = 3.0, 10


def main() -> None:
    config, workdir = cli.FLAGS.config, Path(cli.FLAGS.workdir)
    options = {"allow_changed_config": cli.FLAGS.allow_changed_config}
    sft.train(build.sft_plan(config.cold_start), str(workdir / "cold"), title="cold start", **options)
    runs: dict[str, list[dict]] = {}
    rows = []
    for arm in config.arms:
        folder = workdir / compare.folder_name(config, arm, config.seeds[0])
        arm_config = compare.arm_config(config, arm, config.seeds[0], workdir / "cold")
        rl.train(build.rl_plan(arm_config), str(folder), title=arm, **options)
        runs[arm] = read_jsonl(folder / "metrics.jsonl")
        rows.append(row(arm, runs[arm]))
    (workdir / "table.md").write_text(compare.markdown(rows, COLUMNS))
    draw(runs, workdir / "objectives.png")
    compare.show(rows, COLUMNS)


def spikes(norms: list[float]) -> int:
    """Rollouts whose largest gradient norm exceeds SPIKE times the median of the WINDOW before it."""
    return sum(norm > SPIKE * statistics.median(norms[i - WINDOW : i]) for i, norm in enumerate(norms) if i >= WINDOW)


def row(arm: str, metrics: list[dict]) -> list[str]:
    updates = [line for line in metrics if "loss" in line]
    solved = [line["eval/pass@1"] for line in metrics if "eval/pass@1" in line]
    return [
        arm,
        f"{solved[0]:.3f}",
        f"{solved[-1]:.3f}",
        f"{max(solved):.3f}",
        f"{statistics.mean(line['clip_ratio/tokens'] for line in updates):.2%}",
        str(spikes([line["grad_norm/max"] for line in updates])),
        f"{statistics.mean(line['entropy'] for line in updates[-5:]):.3f}",
    ]


def draw(runs: dict[str, list[dict]], out: Path) -> None:
    """Small multiples: training reward of each preset, the others behind it in grey, held-out pass@1 as dots."""
    columns = 5
    count = -(-len(runs) // columns)
    figure, grid = plt.subplots(
        count, columns, figsize=(2.3 * columns, 1.9 * count), sharex=True, sharey=True, layout="constrained"
    )
    for axes in grid.flat[len(runs) :]:
        axes.set_visible(False)
    for axes, (arm, lines) in zip(grid.flat, runs.items(), strict=False):
        for other in runs.values():
            axes.plot(*curve(other, "reward/mean"), color="0.85", linewidth=0.7, zorder=1)
        axes.plot(*curve(lines, "reward/mean"), color="#0072B2", linewidth=1.5, zorder=2)
        axes.plot(*curve(lines, "eval/pass@1"), "o", color="#D55E00", markersize=3.5, markeredgecolor="white", zorder=3)
        axes.set_title(arm, fontsize=9, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8, labelbottom=True)
        axes.set_ylim(0, 1)
    figure.supxlabel("Rollout", fontsize=9)
    figure.supylabel("Training reward (line), held-out pass@1 (dots)", fontsize=9)
    figure.savefig(out, dpi=200)
    plt.close(figure)


def curve(lines: list[dict], name: str) -> tuple[list[int], list[float]]:
    points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


if __name__ == "__main__":
    cli.define_flags()
    cli.run(main, needs="arms")
