"""One cold start, then several objectives from it: same prompts, same keys, a closing table and a figure.

python experiments/compare.py --config=configs/quickstart.py --workdir=runs/quickstart

Leaves in the workdir: cold/ and one folder per arm and seed, table.md, curves.png. Run again, it resumes where it was
stopped."""

import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from gspo import build, rl, sft
from gspo.run import cli
from gspo.run.writers import read_jsonl

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
from plot_curves import plot_curves

COLUMNS = (
    "arm", "pass@1 before", "pass@1 after", "clipped tokens", "experts changed per "
                                                              "update", "experts changed per rollout",
    "s per rollout", "tokens/s",
)  # fmt: skip


def main() -> None:
    config, workdir = cli.FLAGS.config, Path(cli.FLAGS.workdir)
    options = {"allow_changed_config": cli.FLAGS.allow_changed_config}
    start = time.perf_counter()
    sft.train(build.sft_plan(config.cold_start), str(workdir / "cold"), title="cold start", **options)

    folders = {arm: [workdir / folder_name(config, arm, seed) for seed in config.seeds] for arm in config.arms}
    for arm, seeds in folders.items():
        for seed, folder in zip(config.seeds, seeds, strict=True):
            rl.train(
                build.rl_plan(arm_config(config, arm, seed, workdir / "cold")),
                str(folder),
                title=f"{arm} (seed {seed})",
                **options,
            )

    rows = [row(arm, runs) for arm, runs in folders.items()]
    (workdir / "table.md").write_text(markdown(rows))
    runs = [(arm, folder) for arm, seeds in folders.items() for folder in seeds]
    plot_curves([folder for _, folder in runs], [arm for arm, _ in runs], workdir / "curves.png")
    show(rows)
    print(
        f"curves: {workdir / 'curves.png'}   table: {workdir / 'table.md'}   {time.perf_counter() - start:.0f} s in all"
    )


def folder_name(config: ConfigDict, arm: str, seed: int) -> str:
    name = arm.lower().replace(" ", "_")
    return name if len(config.seeds) == 1 else f"{name}-{seed}"


def arm_config(config: ConfigDict, arm: str, seed: int, cold: Path) -> ConfigDict:
    """The base with the arm laid over it, its seed, and the cold start to begin from."""
    arm_config = ConfigDict(config.base.to_dict())
    arm_config.update(config.arms[arm].to_dict())
    arm_config.seed = seed
    arm_config.init_from = str(cold)
    return arm_config


def row(arm: str, folders: list[Path]) -> list[str]:
    """One row of the table: the mean over the arm's seeds, its range in brackets where there are several."""

    def over_seeds(value_of, form: str) -> str:
        values = [
            value_of(read_jsonl(folder / "metrics.jsonl"), read_jsonl(folder / "timings.jsonl")) for folder in folders
        ]
        text = form.format(statistics.mean(values))
        return text if len(values) == 1 else f"{text} [{form.format(min(values))}, {form.format(max(values))}]"

    def mean_of(name):
        return lambda metrics, _: statistics.mean(line[name] for line in metrics if name in line)

    def seconds(_, timings):
        return statistics.median(sum(line[phase] for phase in rl.PHASES) for line in timings)

    return [
        arm,
        over_seeds(lambda metrics, _: metrics[0]["eval/pass@1"], "{:.3f}"),
        over_seeds(lambda metrics, _: metrics[-1]["eval/pass@1"], "{:.3f}"),
        over_seeds(mean_of("clip_ratio/tokens"), "{:.2%}"),
        over_seeds(mean_of("routing/experts_changed_per_update"), "{:.2%}"),
        over_seeds(mean_of("routing/experts_changed"), "{:.2%}"),
        over_seeds(seconds, "{:.2f}"),
        over_seeds(lambda _, timings: statistics.median(line["tokens_per_second"] for line in timings), "{:,.0f}"),
    ]


def markdown(rows: list[list[str]], columns: tuple[str, ...] = COLUMNS) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def show(rows: list[list[str]], columns: tuple[str, ...] = COLUMNS) -> None:
    table = Table(*columns)
    for cells in rows:
        table.add_row(*cells)
    Console().print(table)


def save_panels(figure: Figure, panels: Sequence[Axes], out: Path) -> None:
    """Letters, legends and open frames for the panels of a figure; saves it, and lets go of it."""
    for letter, axes in zip("abcd", panels, strict=False):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(letter, loc="left", fontweight="bold", fontsize=10)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(out, dpi=200)
    plt.close(figure)


if __name__ == "__main__":
    cli.define_flags()
    cli.run(main, needs="arms")
