"""The figures and the table of experiments/lab.py: means over updates and seeds, the first update of a rollout aside,
where every ratio is 1."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from gspo.report import bands
from gspo.report.gradients import KINDS
from gspo.report.lab import MOST, Row
from gspo.report.plots import COLORS, STYLE

RATIOS = ("token_var", "routed_var", "mean_changes", "changed_tokens", "changed_share", "top_share", "between_share")


def mean_of(rows: list[Row], name: str) -> float:
    """Mean over the rows that have a number; NaN without one."""
    found = [row[name] for row in rows if name in row and np.isfinite(row[name])]
    return float(np.mean(found)) if found else float("nan")


def objectives_of(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["objective"] for row in rows))


def table_of(rows: list[Row]) -> tuple[list[list[str]], list[str]]:
    """(rows, columns) of text: a line for each run, replay and objective."""
    shown = ["grad_norm", *(f"cosine/{name}" for name in objectives_of(rows))]
    shown += [f"share/{kind}" for kind in KINDS[:4]] + ["clipped_tokens", "ess", *RATIOS]
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if row["update"]:
            groups.setdefault((row["run"], row["replay"], row["objective"]), []).append(row)
    cells = [[*key, *(f"{mean_of(own, name):.3g}" for name in shown)] for key, own in groups.items()]
    return cells, ["run", "replay", "objective", *shown]


def draw(rows: list[Row], workdir: Path) -> None:
    """cosine, kinds, and of a Mixture of Experts variance: PNG, PDF and CSV."""
    later = [row for row in rows if row["update"]]
    if not later:
        return
    free = [row for row in later if row["replay"] == "off"]
    with rc_context(STYLE):
        cosines(free, workdir / "cosine")
        kinds(free, workdir / "kinds")
        if len(free) < len(later):
            variance([row for row in later if row["objective"] == later[0]["objective"]], workdir / "variance")


def cosines(rows: list[Row], out: Path) -> None:
    """GRPO's gradient against GSPO's, over training and over the updates of a rollout; all objectives against each
    other."""
    figure, panels = bands.new_figure(1, 3, 4, 3.3)
    own = [row for row in rows if row["objective"] == "grpo"]
    drawn: bands.Rows = []
    for axes, x in zip(panels, ("rollout", "update"), strict=False):
        drawn += lines(axes, own, "cosine/gspo", x=x, title="GRPO's gradient and GSPO's")
        axes.set(ylabel="Cosine")
        axes.set_ylim(min(axes.get_ylim()[0], 0), 1.02)
    unnamed(panels[1:2])
    names = objectives_of(rows)
    table = [[mean_of([r for r in rows if r["objective"] == a], f"cosine/{b}") for b in names] for a in names]
    bands.heat_panel(panels[2], np.array(table), names, names, "Mean cosine, all runs", labels=("", ""))
    panels[2].tick_params("x", rotation=35)
    bands.save(figure, panels, drawn, out)


def kinds(rows: list[Row], out: Path) -> None:
    """Share of the squared norm of each kind of parameters, means over all rows of a run."""
    figure, panels = bands.new_figure(1, 2, 4, 3.2)
    drawn: bands.Rows = []
    for axes, name in zip(panels, ("grpo", "gspo"), strict=True):
        own = [row for row in rows if row["objective"] == name]
        there = [kind for kind in KINDS if any(row[f"share/{kind}"] > 0 for row in own)]
        for i, (run, color) in enumerate(colors(own).items()):
            values = [mean_of([row for row in own if row["run"] == run], f"share/{kind}") for kind in there]
            width = 0.8 / len(colors(own))
            axes.bar(np.arange(len(there)) - 0.4 + width * (i + 0.5), values, width, color=color, label=run)
            drawn += [{"panel": name, "run": run, "kind": k, "share": v} for k, v in zip(there, values, strict=True)]
        axes.set_xticks(range(len(there)), there, rotation=20)
        axes.set(title=f"Gradient of {name}", ylabel="Share of squared norm")
        axes.set_ylim(0, 1)
    bands.save(figure, panels, drawn, out)


def variance(rows: list[Row], out: Path) -> None:
    """The variance of log w: how it grows, what changed experts add to it, and what share of it changed tokens carry
    beside their share of all tokens. rows: of one objective, since it is the same for all."""
    place = lambda row: tuple(row[name] for name in ("run", "seed", "rollout", "update"))  # noqa: E731
    off = [row for row in rows if row["replay"] == "off"]
    free_var = {place(row): row["token_var"] for row in off}
    on = [row | {"free_var": free_var[place(row)]} for row in rows if row["replay"] == "on"]
    figure, panels = bands.new_figure(2, 2, 4.4, 3.2)

    drawn = lines(panels[0], off, "token_var", x="update", title="Var log w")
    drawn += lines(panels[0], on, "token_var", x="update", title="Var log w, replay on", style="--")
    named(panels[0], "--", "with replay")
    panels[0].set(title="Variance of log w over tokens", yscale="log")

    drawn += lines(panels[1], on, "token_var", "free_var", x="update", title="Var log w with replay / without")
    drawn += lines(panels[1], on, "routed_var", "free_var", x="update", title="Var of what replay takes", style=":")
    named(panels[1], ":", "variance of what replay takes")
    panels[1].set(title="With replay, over that without")

    for axes, column, whose in ((panels[2], "changed_share", "Changed"), (panels[3], "top_share", "Most changed")):
        drawn += lines(axes, off, column, x="update", title=f"{whose}: share of Var log w")
        drawn += lines(axes, on, column, x="update", title=f"{whose}: share of Var log w, replay on", style="--")
        named(axes, "--", "with replay")
    drawn += lines(panels[2], off, "changed_tokens", x="update", title="Changed: share of tokens", style=":")
    named(panels[2], ":", "their share of tokens")
    panels[3].axhline(MOST, linestyle=":", color="0.4", label="their share of tokens")
    panels[2].set(title="Tokens with a changed expert", ylabel="Share of Var log w")
    panels[3].set(title=f"The {MOST:.0%} of tokens with most changes", ylabel="Share of Var log w")
    panels[1].set_ylim(bottom=0)
    for axes in panels[2:]:
        axes.set_ylim(0, 1.05)
    unnamed(panels[1:])
    bands.save(figure, panels, drawn, out)


def colors(rows: list[Row]) -> dict[str, str]:
    """Run -> its color."""
    return {run: COLORS[i % len(COLORS)] for i, run in enumerate(dict.fromkeys(row["run"] for row in rows))}


def named(axes: Axes, style: str, label: str) -> None:
    """A line of the legend for what is drawn in this style, whatever its color."""
    axes.plot([], [], style, color="0.4", label=label)


def unnamed(panels: Sequence[Axes]) -> None:
    """Takes the runs out of the legends: the first panel's names them for all."""
    for line in (line for axes in panels for line in axes.lines if "(n =" in line.get_label()):
        line.set_label("_")


def lines(
    axes: Axes, rows: list[Row], part: str, whole: str = "", *, x: str, title: str, style: str = "-"
) -> bands.Rows:
    """A column against another, x: for each run the mean over seeds of their own means; solid lines have a band, the
    range of the seeds. whole: the column whose mean a seed's is divided by."""
    drawn: bands.Rows = []
    for run, color in colors(rows).items():
        own = [row for row in rows if row["run"] == run]
        seeds, found = sorted({row["seed"] for row in own}), []
        for at in sorted({row[x] for row in own}):
            of_seeds = [[row for row in own if (row["seed"], row[x]) == (seed, at)] for seed in seeds]
            means = [mean_of(each, part) / (mean_of(each, whole) or np.nan if whole else 1) for each in of_seeds]
            means = [mean for mean in means if np.isfinite(mean)]
            if means:
                found.append((at, float(np.mean(means)), min(means), max(means)))
        if not found:
            continue
        at, middle, low, high = zip(*found, strict=True)
        if style == "-":
            axes.fill_between(at, low, high, color=color, alpha=0.2, linewidth=0)
        label = {"label": f"{run} (n = {len(seeds)})"} if style == "-" else {}
        axes.plot(at, middle, style, marker="o", markersize=3, color=color, **label)
        names = ("run", x, "mean", "low", "high")
        drawn += [{"panel": title} | dict(zip(names, (run, *values), strict=True)) for values in found]
    axes.set(xlabel={"rollout": "Rollout", "update": "Updates since the rollout"}[x], title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return drawn
