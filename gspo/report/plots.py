"""Figures of runs: training curves side by side, and what all figures of experiments share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from gspo.run.writers import read_jsonl
from gspo.types import UserError

# Okabe & Ito, safe for colour-blind eyes.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.edgecolor": "#444444",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "xtick.labelcolor": "black",
    "ytick.labelcolor": "black",
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "savefig.dpi": 200,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
}
POINTS = {"linestyle": "none", "markersize": 5.5, "markeredgecolor": "white"}  # held-out pass@1


class Panel(NamedTuple):
    metric: str
    title: str
    unit: str
    factor: float = 1.0  # from the unit of the file to the unit of the axis
    log: bool = False
    points: str | None = None  # a second metric, present on some lines only: markers


REWARD = Panel("reward/mean", "Reward", "Mean reward, pass@1", points="eval/pass@1")
CLIPPED = Panel("clip_ratio/tokens", "Clipped tokens", "Share of tokens [%]", factor=100, log=True)
EXPERTS = Panel("routing/experts_changed", "Experts changed per rollout", "Share of choices [%]", factor=100)
ENTROPY = Panel("entropy", "Entropy of the policy", "Nats per token")
LENGTH = Panel("completions/mean_length", "Length of completions", "Tokens")


# ---------------------------------------------------------------------------------------------------- data


def short_names(workdirs: Sequence[str | Path]) -> list[str]:
    """The folders' own names, or whole paths where two are called the same: those are not seeds of one run."""
    names = [Path(workdir).resolve().name for workdir in workdirs]
    return names if len(set(names)) == len(names) else [str(workdir) for workdir in workdirs]


def load(workdir: str | Path) -> list[dict[str, Any]]:
    """The lines of <workdir>/metrics.jsonl. Raises UserError if there are none."""
    path = Path(workdir) / "metrics.jsonl"
    if not Path(workdir).is_dir():
        raise UserError(f"no such workdir: {workdir}")
    if not path.is_file():
        raise UserError(f"{workdir} holds no metrics.jsonl: is it the --workdir of a run?")
    try:
        lines = read_jsonl(path)
    except ValueError as error:
        raise UserError(str(error)) from error
    if not lines:
        raise UserError(f"{path} holds no complete line yet")
    return lines


def series(lines: list[dict[str, Any]], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values, float64, of the lines that hold a finite number under `metric`."""
    pairs = [(line["step"], line[metric]) for line in lines if isinstance(line.get(metric), int | float)]
    steps, values = np.array(pairs, np.float64).reshape(-1, 2).T
    return steps, values


def smoothed(values: np.ndarray, weight: float) -> np.ndarray:
    """Exponential moving average, without the pull of a zero at its start (Adam's correction of the bias)."""
    total, norm, out = 0.0, 0.0, np.empty_like(values)
    for i, value in enumerate(values):
        total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        out[i] = total / norm
    return out


def across_seeds(curves: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Steps, mean, lowest and highest over the seeds, at the steps that all of them have."""
    steps = sorted(set.intersection(*(set(s) for s, _ in curves)))
    table = np.array([[dict(zip(s, v, strict=True))[step] for step in steps] for s, v in curves])
    return np.array(steps), table.mean(0), table.min(0), table.max(0)


# ---------------------------------------------------------------------------------------------------- drawing


def draw(axes: Axes, panel: Panel, runs: dict[str, list[list[dict[str, Any]]]], smooth: float) -> None:
    """One panel: all runs."""
    silent = []
    for i, (label, seeds) in enumerate(runs.items()):
        color = COLORS[i % len(COLORS)]
        curves = [(s, v * panel.factor) for s, v in (series(lines, panel.metric) for lines in seeds) if len(s)]
        if curves and panel.log and not any((v > 0).any() for _, v in curves):
            silent.append((label, color))  # nothing that a log scale could show
            continue
        if curves:
            hide = (lambda v: np.where(v > 0, v, np.nan)) if panel.log else (lambda v: v)
            steps, mean, low, high = across_seeds([(s, smoothed(v, smooth)) for s, v in curves])
            if len(curves) > 1:
                axes.fill_between(steps, hide(low), high, color=color, alpha=0.18, linewidth=0)
            elif smooth:
                axes.plot(curves[0][0], hide(curves[0][1]), color=color, alpha=0.35, linewidth=0.7)
            axes.plot(
                steps, hide(mean), "." if len(steps) == 1 else "-", color=color, linewidth=1.8, solid_capstyle="round"
            )
        points = [c for c in (series(lines, panel.points) for lines in seeds) if len(c[0])] if panel.points else []
        if points:
            steps, mean, low, high = across_seeds(points)
            spread = (mean - low, high - mean) if len(points) > 1 else None
            style = POINTS | {"marker": MARKERS[i % len(MARKERS)], "markeredgewidth": 0.8, "elinewidth": 1}
            axes.errorbar(steps, mean, spread, color=color, zorder=4, clip_on=False, **style)
    for n, (label, color) in enumerate(silent):
        place = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "right"}
        axes.annotate(f"{label}: none", (1, 0), (-4, 4 + 12 * n), color=color, **place)
    if silent and not axes.lines:
        axes.set_yticks([])
    elif silent:
        axes.set_yscale("log")
        axes.set_ylim(bottom=axes.get_ylim()[0] * 0.5 ** len(silent))  # room for the words


def dress(axes: Axes, panel: Panel, letter: str) -> None:
    axes.set_title(panel.title, loc="left", pad=7)
    axes.annotate(
        letter, (0, 1), (-30, 7), xycoords="axes fraction", textcoords="offset points", weight="bold", fontsize=11
    )
    axes.set_xlabel("Rollout")
    axes.set_ylabel(panel.unit)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.margins(x=0.02)
    left, right = axes.get_xlim()
    if right - left < 1:  # a single rollout so far
        axes.set_xlim((left + right) / 2 - 1, (left + right) / 2 + 1)
    if panel.log and axes.lines:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        low, high = axes.get_ylim()
        if high < 2 * low:  # a constant: an axis over its rounding errors would be singular
            axes.set_ylim(low / 2, high * 2)
        if high < 100 * low:  # less than two decades have too few powers of ten to be read
            axes.yaxis.set_minor_formatter(
                FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
            )
            axes.tick_params(axis="y", which="minor", labelsize=8)
        else:
            axes.yaxis.set_minor_formatter(NullFormatter())
    elif panel is REWARD:
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -0.02) if low > -0.2 else low, 1.0 if 0.8 < high <= 1.15 else high)
    elif axes.get_ylim()[0] < 0.3 * axes.get_ylim()[1]:
        axes.set_ylim(bottom=0)


def legend_handles(runs: dict[str, list[Any]], has_points: bool, smooth: float) -> list[Any]:
    """One handle per run in its colour, then what the kinds of line mean, in grey."""
    handles = []
    for i, (label, seeds) in enumerate(runs.items()):
        marker = POINTS | {"marker": MARKERS[i % len(MARKERS)], "linestyle": "-"} if has_points else {}
        text = f"{label} ({len(seeds)} seeds)" if len(seeds) > 1 else label
        handles.append(Line2D([], [], color=COLORS[i % len(COLORS)], linewidth=2, label=text, **marker))
    grey = "#777777"
    if smooth and any(len(seeds) == 1 for seeds in runs.values()):
        handles.append(Line2D([], [], color=grey, alpha=0.6, linewidth=0.8, label="unsmoothed"))
    if any(len(seeds) > 1 for seeds in runs.values()):
        handles.append(Patch(color=grey, alpha=0.3, linewidth=0, label="range over seeds"))
    if has_points:
        handles.append(Line2D([], [], color=grey, marker="o", label="held-out pass@1", **POINTS))
    return handles


def plot_curves(
    workdirs: Sequence[str | Path],
    labels: Sequence[str] | None = None,
    out: str | Path = "curves.png",
    *,
    smooth: float = 0.8,
    title: str | None = None,
) -> Path:
    """Writes the figure to `out` (the ending chooses the format) and returns its path.

    workdirs  folders with a metrics.jsonl
    labels    one per workdir; workdirs with the same label are seeds of one curve. None: the folders' names
    smooth    weight of the past in the moving average, in [0, 1); 0: the values themselves
    Raises: UserError on a missing folder or file, on data without any of the metrics, on an `out` that cannot be
    written."""
    if not 0 <= smooth < 1:
        raise UserError(f"smooth={smooth} must lie in [0, 1)")
    labels = short_names(workdirs) if labels is None else labels
    runs: dict[str, list[list[dict[str, Any]]]] = {}
    for label, workdir in zip(labels, workdirs, strict=True):
        runs.setdefault(label, []).append(load(workdir))

    def has_data(metric: str | None) -> bool:
        return any(len(series(lines, metric)[0]) for seeds in runs.values() for lines in seeds) if metric else False

    last = ENTROPY if has_data(ENTROPY.metric) else LENGTH
    panels = [p for p in (REWARD, CLIPPED, EXPERTS, last) if has_data(p.metric) or has_data(p.points)]
    if not panels:
        raise UserError(f"no metric to plot in {', '.join(map(str, workdirs))}")
    rows, columns = (2, 2) if len(panels) == 4 else (1, len(panels))
    with plt.rc_context(STYLE):
        size = (4.0 * columns, 2.7 * rows + 0.4)
        figure, grid = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
        for letter, axes, panel in zip("abcd", grid.flat, panels, strict=False):
            draw(axes, panel, runs, smooth)
            dress(axes, panel, letter)
        handles = legend_handles(runs, has_data(REWARD.points), smooth)
        ncols = min(len(handles), 2 * columns + 1)
        figure.legend(handles=handles, loc="outside lower center", ncols=ncols, frameon=False, borderaxespad=0.1)
        if title:
            figure.suptitle(title, fontsize=11)
        try:
            figure.savefig(out)
        except (OSError, ValueError) as error:
            raise UserError(f"--out={out} cannot be written: {error}") from error
        finally:
            plt.close(figure)
    return Path(out)


def save_panels(figure: Figure, panels: Sequence[Axes], out: str | Path) -> None:
    """Letters, legends and open frames for the panels of a figure; saves it, and lets go of it."""
    for letter, axes in zip("abcd", panels, strict=False):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(letter, loc="left", fontweight="bold", fontsize=10)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(out, dpi=200)
    plt.close(figure)
