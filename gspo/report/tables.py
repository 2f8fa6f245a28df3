"""Tables of runs: values from the lines of metrics.jsonl, cells over several seeds, rows to Markdown and the terminal.

A run may lack a metric: a dense model routes nothing, one update per rollout has no second one to compare with, and
without evaluations during training nothing is known from before it. Its cell holds "-".
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gspo.run.writers import read_jsonl
from gspo.types import UserError

Lines = list[dict[str, Any]]


def lines_of(folder: Path, name: str) -> Lines:
    """The lines of a file of a run; none where the file is missing. Raises ValueError on a broken line."""
    return read_jsonl(folder / name) if (folder / name).exists() else []


def values(lines: Lines, name: str) -> list[float]:
    """The numbers under `name`, of the lines that have one."""
    return [line[name] for line in lines if isinstance(line.get(name), int | float)]


def mean(lines: Lines, name: str) -> float | None:
    found = values(lines, name)
    return statistics.mean(found) if found else None


def before_and_after(lines: Lines, name: str) -> tuple[float | None, float | None]:
    """Of an evaluation: before the first update, and after the last. Lines in between do not stand in for either."""
    before, after = values(lines[:1], name), values(lines[-1:], name)
    untouched = before and lines[0]["step"] == 0
    return before[0] if untouched else None, after[0] if after else None


def cell(over_seeds: Sequence[float | None], form: str) -> str:
    """The mean over the seeds, with its range in brackets where there are several: "0.52 [0.50, 0.54]".

    A seed without a value is None: it is left out, and the cell says how many are in."""
    known = [value for value in over_seeds if value is not None]
    if not known:
        return "-"
    text = form.format(statistics.mean(known))
    if len(known) > 1:
        text += f" [{form.format(min(known))}, {form.format(max(known))}]"
    return text if len(known) == len(over_seeds) else f"{text} ({len(known)} of {len(over_seeds)} seeds)"


def load_by_layer(runs: Mapping[str, Lines]) -> tuple[list[list[str]], list[str]]:
    """(rows, columns): how much more than the mean the busiest expert of each layer has to do, 1 where the load is
    even, with the coefficient of variation over the experts in brackets; at the first and the last update of each named
    run. The last row is the mean over layers. Raises UserError for a run whose metrics tell no load."""
    peak, variation = "routing/load_max_over_mean_by_layer", "routing/load_cv_by_layer"
    columns, loads = ["layer"], []
    for name, lines in runs.items():
        known = [line for line in lines if isinstance(line.get(peak), list)]
        if not known:
            raise UserError(f"{name}: its metrics tell no load of experts; give a run of a Mixture of Experts")
        for when, line in (("first", known[0]), ("last", known[-1])):
            columns.append(f"{name}, {when} update")
            layers = list(zip(line[peak], line[variation], strict=True))
            means = [statistics.mean(values) for values in zip(*layers, strict=True)]
            loads.append([f"{1 + most:.2f} ({spread:.2f})" for most, spread in (*layers, means)])
    labels = [*map(str, range(1, max(map(len, loads), default=1))), "mean"]
    return [list(cells) for cells in zip(labels, *loads, strict=True)], columns


def markdown(rows: Sequence[Sequence[str]], columns: Sequence[str]) -> str:
    """A table, in which a bar within a cell is escaped: it would end the cell."""
    lines = [[cell.replace("|", r"\|") for cell in line] for line in (columns, ["---"] * len(columns), *rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def show(rows: Sequence[Sequence[str]], columns: Sequence[str]) -> None:
    """The table on the terminal."""
    table = Table(*columns)
    for cells in rows:
        table.add_row(*cells)
    Console().print(table)
