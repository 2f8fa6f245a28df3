"""Panels over many seeds: curves with their bands, numbers against a dial, and tables as colours.

Every panel returns what it has drawn as rows for a CSV; `save` writes a figure as PNG, PDF and CSV.
"""

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gspo.report.evidence import STATISTICS, WINDOW, band, interval, iqm, middle_of, smoothed
from gspo.report.ledger import Curves
from gspo.report.plots import MARKERS, STYLE

Rows = list[dict[str, str]]
LINES = ("-", "--", ":")
SHADES = {  # of arms whose name holds a method's, in their order; those of other names have other colours
    "GRPO": ("#D55E00", "#E69F00", "#8C3B00", "#F5C77E"),
    "GSPO": ("#0072B2", "#56B4E9", "#003F66", "#A9D6F5"),
    "": ("#009E73", "#CC79A7", "#000000", "#999999"),
}


def colors_of(names: Iterable[str]) -> dict[str, str]:
    """name -> colour, by the first method in a name and by how many of that method came before: a method looks alike in
    all figures of one kind."""
    found, used = {}, dict.fromkeys(SHADES, 0)
    for name in names:
        method = next(method for method in SHADES if method in name)
        found[name] = SHADES[method][used[method] % len(SHADES[method])]
        used[method] += 1
    return found


def matrix(curves: Curves, column: str, length: int = 0) -> np.ndarray:
    """[seeds, rollouts] of what the rollouts of training say. A run that diverged says nothing after: its reward is 0
    then, and the rest of it is as it was last."""
    rows = [curve[column][~np.isnan(curve["reward"])] for curve in curves.values()]
    length = max([length, *map(len, rows)])
    missing = [np.full(length - len(row), 0.0 if column == "reward" else row[-1]) for row in rows]
    return np.stack([np.concatenate(pair) for pair in zip(rows, missing, strict=True)])


def curve_panel(
    axes: Axes,
    arms: Mapping[str, Curves],
    column: str,
    label: str,
    *,
    x: str = "rollout",
    factor: float = 1.0,
    log: bool = False,
    window: int = WINDOW,
    colors: Mapping[str, str] | None = None,
) -> Rows:
    """Interquartile mean over seeds with its 95% bootstrap band, each seed as a thin line; all smoothed over `window`
    rollouts. arms: label -> curves; x: "rollout" or "tokens", in millions then. log: what is 0 leaves a gap."""
    rows: Rows = []
    shown = (lambda values: np.where(values > 0, values, np.nan)) if log else (lambda values: values)
    colors = colors or colors_of(name for name, curves in arms.items() if curves)
    used: dict[str, int] = {}
    for name, curves in arms.items():
        if not curves:
            continue
        color = colors[name]
        style = LINES[used.setdefault(color, 0) % len(LINES)]  # where colours begin again
        used[color] += 1
        values_SR = np.stack([smoothed(row, window) for row in factor * matrix(curves, column)])
        at_R = np.arange(1, values_SR.shape[1] + 1) if x == "rollout" else matrix(curves, x).mean(axis=0) / 1e6
        middle_R, low_R, high_R = band(values_SR)
        line_R = shown(middle_R)
        axes.plot(at_R, shown(values_SR).T, color=color, alpha=0.22, linewidth=0.5)
        axes.fill_between(at_R, low_R, high_R, where=~np.isnan(line_R), color=color, alpha=0.2, linewidth=0)
        axes.plot(at_R, line_R, style, color=color, linewidth=1.8, label=f"{name} (n = {len(curves)})")
        rows += [
            {"panel": label, "arm": name, x: f"{a:.6g}", "iqm": f"{m:.6g}", "low": f"{lo:.6g}", "high": f"{hi:.6g}"}
            for a, m, lo, hi in zip(at_R, middle_R, low_R, high_R, strict=True)
        ]
    axes.set(xlabel="Rollout" if x == "rollout" else "Training tokens [millions]", ylabel=label)
    if log and any((np.asarray(line.get_ydata()) > 0).any() for line in axes.lines):  # else nothing that it could show
        axes.set_yscale("log")
    axes.margins(x=0.01)
    return rows


def ordinary_panel(
    axes: Axes, own: Curves, before: Curves, column: str, title: str, *, color: str, window: int = WINDOW
) -> None:
    """Own curves over the range of those that were run before, smoothed over `window` rollouts; a thin line: not
    smoothed."""
    length = max(len(row) for row in matrix(own, column))
    at_R = np.arange(1, length + 1)
    if before:
        values_SR = np.stack([smoothed(row, window) for row in matrix(before, column)[:, :length]])
        label = f"range of {len(before)} seeds run before"
        axes.fill_between(at_R[: values_SR.shape[1]], values_SR.min(axis=0), values_SR.max(axis=0), color="0.85",
                          linewidth=0, label=label)  # fmt: skip
    for row in matrix(own, column):
        axes.plot(at_R, row, color=color, linewidth=0.5, alpha=0.5)
        axes.plot(at_R, smoothed(row, window), color=color, linewidth=1.8)
    axes.set_title(title, loc="left", pad=7)
    axes.set(xlabel="Rollout")


def dial_panel(
    axes: Axes,
    arms: Mapping[str, Sequence[tuple[float, Curves]]],
    statistic: str,
    label: str,
    dial: str,
    *,
    factor: float = 1.0,
    colors: Mapping[str, str] | None = None,
) -> Rows:
    """A statistic of runs against a dial: label -> (position, curves)."""
    measure = STATISTICS[statistic]
    values = {
        name: [(at, factor * np.array([measure(own) for own in curves.values()])) for at, curves in places if curves]
        for name, places in arms.items()
    }
    return value_panel(axes, values, label, dial, middle=middle_of(statistic), colors=colors)


def value_panel(
    axes: Axes,
    arms: Mapping[str, Sequence[tuple[float, np.ndarray]]],
    label: str,
    dial: str,
    *,
    middle: Callable[..., np.ndarray] = iqm,
    colors: Mapping[str, str] | None = None,
) -> Rows:
    """Numbers against a dial: label -> (position, numbers [n]). Points are interquartile means, or another middle, with
    95% bootstrap intervals; the single numbers are small dots."""
    rows: Rows = []
    colors = colors or colors_of(name for name, places in arms.items() if places)
    for i, (name, places) in enumerate(arms.items()):
        if not places:
            continue
        color = colors[name]
        at, middles = [at for at, _ in places], [float(middle(own)) for _, own in places]
        edges = np.array([interval(own, middle=middle) for _, own in places]).T
        counts = sorted({len(own) for _, own in places})
        n = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        axes.errorbar(at, middles, np.abs(edges - np.array(middles)), color=color, marker=MARKERS[i % len(MARKERS)],
                      markersize=4.5, linewidth=1.5, elinewidth=0.9, label=f"{name} (n = {n})")  # fmt: skip
        for place, own in places:
            axes.plot([place] * len(own), own, ".", color=color, alpha=0.35, markersize=3)
        rows += [
            {"panel": label, "arm": name, dial: f"{a:g}", "iqm": f"{m:.6g}", "low": f"{lo:.6g}", "high": f"{hi:.6g}"}
            for a, m, lo, hi in zip(at, middles, *edges, strict=True)
        ]
    axes.set(xlabel=dial, ylabel=label)
    return rows


def heat_panel(
    axes: Axes, table: np.ndarray, rows: Sequence[str], columns: Sequence[str], title: str, *, labels: tuple[str, str]
) -> Rows:
    """Numbers in [0, 1] as colours, with the numbers in them; NaN: not run. The largest is framed."""
    axes.imshow(table, vmin=0, vmax=1, cmap="cividis", aspect="auto")
    best = np.unravel_index(np.nanargmax(table), table.shape) if not np.isnan(table).all() else None
    for (i, j), value in np.ndenumerate(table):
        text = "-" if np.isnan(value) else f"{value:.2f}"
        axes.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if value < 0.55 else "black",
                  weight="bold" if (i, j) == best else "normal")  # fmt: skip
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel=labels[1], ylabel=labels[0], title=title)
    axes.grid(False)
    return [
        {"panel": title, labels[0]: rows[i], labels[1]: columns[j], "value": f"{value:.6g}"}
        for (i, j), value in np.ndenumerate(table)
    ]


def save(figure: Figure, panels: Sequence[Axes], rows: Rows, out: Path, one_legend: bool = False) -> None:
    """Letters, where there are several panels, and legends; OUT.png, and with rows OUT.pdf and OUT.csv. one_legend:
    that of the first panel stands below the figure, for all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    for letter, axes in zip("abcdefgh" if len(panels) > 1 else "", panels, strict=False):
        axes.annotate(letter, (0, 1), (-28, 8), xycoords="axes fraction", textcoords="offset points", weight="bold",
                      fontsize=11)  # fmt: skip
    if one_legend:
        handles, labels = panels[0].get_legend_handles_labels()
        columns = min(len(handles), int(figure.get_figwidth() / 1.75))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    for axes in panels if not one_legend else ():
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7.5, framealpha=0.75, edgecolor="none")
    for ending in ("png", "pdf") if rows else ("png",):
        figure.savefig(out.with_suffix(f".{ending}"), metadata={"CreationDate": None} if ending == "pdf" else None)
    plt.close(figure)
    if rows:
        write_csv(rows, out.with_suffix(".csv"))


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The columns of all rows; a row has an empty cell where it lacks one."""
    fields = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fields, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def new_figure(rows: int, columns: int, width: float = 3.6, height: float = 2.7) -> tuple[Figure, list[Axes]]:
    """A figure in the house's style, and its panels in reading order."""
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            rows, columns, figsize=(width * columns, height * rows), layout="constrained", squeeze=False
        )
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    return figure, list(grid.flat)
