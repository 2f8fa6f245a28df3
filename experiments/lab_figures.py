"""The figures and the table of experiments/lab.py."""

from pathlib import Path

import numpy as np

from gspo.report import bands
from gspo.report.gradients import KINDS
from gspo.report.lab import Row
from gspo.report.plots import COLORS


def mean_of(rows: list[Row], name: str) -> float:
    """Mean over the rows that have a number; NaN without one."""
    found = [row[name] for row in rows if name in row and np.isfinite(row[name])]
    return float(np.mean(found)) if found else float("nan")


def table_of(rows: list[Row]) -> tuple[list[list[str]], list[str]]:
    """Means over seeds, rollouts and updates, the first update of a rollout aside: there every ratio is 1."""
    shown = ["grad_norm", *sorted(name for name in rows[0] if name.startswith("cosine/")), "share/routers"]
    shown += ["share/experts", "share/attention", "share/embeddings", "clipped_tokens", "ess", "token_var"]
    shown += ["changed_tokens", "changed_share", "between_share"]
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if row["update"]:
            groups.setdefault((row["run"], row["replay"], row["objective"]), []).append(row)
    cells = [[*key, *(f"{mean_of(own, name):.3g}" for name in shown)] for key, own in groups.items()]
    return cells, ["run", "replay", "objective", *shown]


def draw(rows: list[Row], workdir: Path) -> None:
    later = [row for row in rows if row["update"]]
    runs = list(dict.fromkeys(row["run"] for row in later))
    if not later:
        return
    figure, (axes,) = bands.new_figure(1, 1, 4.4, 3.2)
    pair = [row | {"value": row.get("cosine/gspo", np.nan)} for row in later if row["objective"] == "grpo"]
    drawn = over_training(axes, [row for row in pair if row["replay"] == "off"], runs, "Cosine of GRPO's and GSPO's")
    bands.save(figure, [axes], drawn, workdir / "cosine")

    figure, panels = bands.new_figure(1, 2, 4, 3.2)
    drawn = []
    for axes, name in zip(panels, ("grpo", "gspo"), strict=True):
        drawn += kinds_panel(axes, [r for r in later if (r["objective"], r["replay"]) == (name, "off")], runs, name)
    bands.save(figure, panels, drawn, workdir / "kinds")

    first = [row for row in later if row["objective"] == later[0]["objective"]]  # what follows is the same for all
    off, on = ([row for row in first if row["replay"] == replay] for replay in ("off", "on"))
    if not on:  # a dense model
        return
    key = lambda row: tuple(row[name] for name in ("run", "seed", "rollout", "update"))  # noqa: E731
    free = {key(row): row["token_var"] for row in off}
    kept = [row | {"value": row["token_var"] / free[key(row)] if free[key(row)] else np.nan} for row in on]
    figure, panels = bands.new_figure(1, 3, 3.8, 3.2)
    drawn = over_training(panels[0], kept, runs, "Var log w, replay on / off")
    for axes, replay, own in ((panels[1], "off", off), (panels[2], "on", on)):
        valued = [row | {"value": row["changed_share"]} for row in own]
        drawn += over_training(axes, valued, runs, f"Share on changed, replay {replay}")
        axes.set_ylim(0, 1)
    bands.save(figure, panels, drawn, workdir / "variance")


def kinds_panel(axes, rows: list[Row], runs: list[str], name: str) -> list[Row]:
    """Bars: the share of the squared norm of each kind of parameters, means over all rows of a run."""
    drawn = []
    kinds = [kind for kind in KINDS if any(row[f"share/{kind}"] > 0 for row in rows)]
    for i, run in enumerate(runs):
        values = [mean_of([row for row in rows if row["run"] == run], f"share/{kind}") for kind in kinds]
        at = np.arange(len(values)) + 0.8 * (i + 0.5) / len(runs) - 0.4
        axes.bar(at, values, 0.8 / len(runs), color=COLORS[i % len(COLORS)], label=run)
        drawn += [{"panel": name, "run": run, "kind": k, "share": v} for k, v in zip(kinds, values, strict=True)]
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set(title=f"Gradient of {name}", ylabel="Share of squared norm")
    return drawn


def over_training(axes, rows: list[Row], runs: list[str], label: str) -> list[Row]:
    """Means over seeds and updates against the rollout, with the range of the seeds' own means."""
    drawn = []
    for i, run in enumerate(runs):
        own = [row for row in rows if row["run"] == run]
        at = sorted({row["rollout"] for row in own})
        seeds = sorted({row["seed"] for row in own})
        here = lambda seed, rollout, own=own: mean_of(  # noqa: E731
            [row for row in own if (row["seed"], row["rollout"]) == (seed, rollout)], "value"
        )
        table = np.array([[here(seed, rollout) for rollout in at] for seed in seeds]).reshape(len(seeds), len(at))
        known = [k for k in range(len(at)) if np.isfinite(table[:, k]).any()]
        if not known:
            continue
        table, at = table[:, known], np.array(at)[known]
        middle = np.nanmean(table, axis=0)
        color = COLORS[i % len(COLORS)]
        axes.fill_between(at, np.nanmin(table, axis=0), np.nanmax(table, axis=0), color=color, alpha=0.2, linewidth=0)
        axes.plot(at, middle, "o-", markersize=3, color=color, label=f"{run} (n = {len(seeds)})")
        drawn += [{"panel": label, "run": run, "rollout": r, "mean": m} for r, m in zip(at, middle, strict=True)]
    axes.set(xlabel="Rollout", ylabel=label)
    return drawn
