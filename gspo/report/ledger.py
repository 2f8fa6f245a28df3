"""The results of many runs as files to keep: a CSV of curves for each arm, and a list of the runs behind them.

    curves/ARM.csv   a line for each seed and rollout, a function of config, seed and machine alone
    runs.csv         arm, seed, what its config sets, how it ended, seconds, commit, date

A run that is in the list is not made again, also on another machine; figures and verdicts are made from these files.
"""

import csv
import datetime
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gspo.report.arms import seeds_of_arms, slug
from gspo.report.campaign import Run
from gspo.run import disk
from gspo.run.identity import HOW_IT_RUNS
from gspo.run.workdir import flatten
from gspo.run.writers import read_jsonl
from gspo.types import UserError

METRICS = {  # column -> metric; "tokens" are added up, and one that a run has not stays empty
    "rollout": "step",
    "tokens": "num_tokens",
    "reward": "reward/mean",
    "pass@1": "eval/pass@1",
    "clipped": "clip_ratio/tokens",
    "experts_changed": "routing/experts_changed",
    "experts_changed_per_update": "routing/experts_changed_per_update",
    "token_variance": "log_ratio/token_var",
    "sequence_variance": "log_ratio/sequence_var",
    "sampler_k3": "sampler/k3",
    "entropy": "entropy",
    "length": "completions/mean_length",
    "grad_norm": "grad_norm/max",
    "load_cv": "routing/load_cv",
}
NOT_SETTINGS = {"seed", "init_from", *(f"model.{name}" for name in HOW_IT_RUNS if name != "dtype")}
RUN_FIELDS = ("arm", "seed", "config", "ended", "rollouts", "seconds", "commit", "date")
Curve = dict[str, np.ndarray]  # column -> float64, NaN where empty
Curves = dict[int, Curve]  # seed -> its curve


class Ledger:
    """Results in a folder. defaults: the config that runs are described against, so that a field which is added to all
    later changes nobody's description."""

    def __init__(self, folder: Path, defaults: Any, commit: str = ""):
        self.folder, self.defaults, self.commit = folder, defaults, commit
        self.runs: dict[tuple[str, int], dict[str, str]] = {}
        if (folder / "runs.csv").exists():
            with open(folder / "runs.csv", newline="") as file:
                self.runs = {(row["arm"], int(row["seed"])): row for row in csv.DictReader(file)}

    def has(self, run: Run) -> bool:
        """Raises UserError where a run of that name was made with another config."""
        known = self.runs.get((run.arm, run.seed))
        if known and known["config"] != self.digest(run):
            raise UserError(
                f"{self.folder / 'runs.csv'} has {run.name}, made with another config; set another --results, or take "
                "its line out to make it again"
            )
        return known is not None

    def digest(self, run: Run) -> str:
        """Of the fields in which the run differs from the defaults, but for its seed, its weights, and how it runs."""
        before, now = flatten(self.defaults.to_dict()), flatten(run.config.to_dict())
        fields = {name: value for name, value in now.items() if before.get(name) != value}
        fields = {name: value for name, value in fields.items() if name not in NOT_SETTINGS}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]

    def add(self, run: Run) -> None:
        """Takes a run that has ended into the files. Cold starts are not kept."""
        if run.cold is None:
            return
        lines = read_jsonl(run.folder / "metrics.jsonl")
        timings = read_jsonl(run.folder / "timings.jsonl")
        path = self.folder / "curves" / f"{slug(run.arm)}.csv"
        rows = [row for row in _rows(path) if int(row["seed"]) != run.seed] if path.exists() else []
        rows += [{"seed": str(run.seed), **row} for row in _as_rows(lines)]
        rows.sort(key=lambda row: (int(row["seed"]), int(row["rollout"])))
        _write(path, ("seed", *METRICS), rows)
        self.runs[run.arm, run.seed] = {
            "arm": run.arm,
            "seed": str(run.seed),
            "config": self.digest(run),
            "ended": "diverged" if run.diverged else "yes",
            "rollouts": str(run.done),
            "seconds": f"{sum(v for line in timings for name, v in line.items() if name not in NOT_SECONDS):.0f}",
            "commit": self.commit,
            "date": datetime.date.today().isoformat(),
        }
        _write(self.folder / "runs.csv", RUN_FIELDS, [self.runs[key] for key in sorted(self.runs)])

    def curves(self, arm: str) -> Curves:
        """All that is known of an arm; {} where there is nothing yet."""
        path = self.folder / "curves" / f"{slug(arm)}.csv"
        rows = _rows(path) if path.exists() else []
        seeds = sorted({int(row["seed"]) for row in rows})
        return {seed: _columns([row for row in rows if int(row["seed"]) == seed]) for seed in seeds}


def figures_table(config: Any, ledger: Ledger) -> tuple[list[list[str]], tuple[str, ...]]:
    """Rows and columns of a table: how much of each figure of a paper's config has run, the seeds that all its arms
    have, and all together, where a run that stands in several figures counts once."""
    columns = ("figure", "seeds of all arms", "runs", "of", "core hours", "commits", "dates")
    wanted = {name: seeds_of_arms(config, [name]) for name in config.figures} | {"all": seeds_of_arms(config)}
    rows = []
    for name, arms in wanted.items():
        pairs = [(arm, seed) for arm, seeds in arms.items() for seed in seeds]
        known = [ledger.runs[pair] for pair in pairs if pair in ledger.runs]
        whole = {seed for _, seed in pairs} - {pair[1] for pair in pairs if pair not in ledger.runs}
        hours = sum(float(run["seconds"]) for run in known) / 3600
        commits, dates = (sorted({run[field] for run in known}) for field in ("commit", "date"))
        seeds = "-" if name == "all" else _spans(sorted(whole))
        rows.append([name, seeds, str(len(known)), str(len(pairs)), f"{hours:.1f}", ", ".join(commits),
                     " to ".join(dict.fromkeys((*dates[:1], *dates[-1:])))])  # fmt: skip
    return rows, columns


def _spans(numbers: list[int]) -> str:
    """1, 2, 3, 7 as "1 to 3, 7"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][-1] + 1:
            spans[-1] = [spans[-1][0], number]
        else:
            spans.append([number])
    return ", ".join(" to ".join(map(str, span)) for span in spans) or "-"


def curve_of(folder: Path) -> Curve:
    """That of the run in a folder."""
    return _columns(list(_as_rows(read_jsonl(folder / "metrics.jsonl"))))


NOT_SECONDS = ("step", "tokens_per_second")


def _as_rows(lines: list[dict[str, Any]]) -> Iterator[dict[str, str]]:
    """The lines of metrics.jsonl as those of a CSV. The last one holds an evaluation alone."""
    tokens = 0
    for line in lines:
        tokens += line.get("num_tokens", 0)
        values = {column: line.get(metric) for column, metric in METRICS.items()} | {"tokens": tokens}
        yield {name: "" if value is None else f"{value:.7g}" for name, value in values.items()}


def _columns(rows: list[dict[str, str]]) -> Curve:
    return {name: np.array([float(row[name] or "nan") for row in rows]) for name in METRICS}


def _rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def _write(path: Path, fields: tuple[str, ...], rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [",".join(fields), *(",".join(row[name] for name in fields) for row in rows)]
    disk.write_whole(path, "\n".join(lines) + "\n")
