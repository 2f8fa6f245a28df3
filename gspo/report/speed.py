"""Tables of what scripts/benchmark.py has measured, from its JSON files: no number is typed by hand.

A README has a place for each file, filled by `fill`:

    <!-- speed: step-2-cores -->
    <!-- end -->
"""

import json
import re
from pathlib import Path
from typing import Any

from gspo.report.tables import markdown

Record = dict[str, Any]
PLACE = re.compile(r"(<!-- speed: ([\w.-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
GIB = 2**30


def seconds(value: Record) -> str:
    """ "0.571 [0.560, 0.613]": the median with the least and the most; milliseconds where it is short."""
    scale, unit = (1, " s") if value["median"] >= 0.1 else (1e3, " ms")
    median, low, high = (f"{scale * value[name]:.3g}" for name in ("median", "min", "max"))
    return f"{median}{unit}" + (f" [{low}, {high}]" if value["repeats"] > 1 else "")


def share(value: float) -> str:
    return f"{value:.1%}"


def gib(value: float | None) -> str:
    return "-" if value is None else f"{value / GIB:.2f} GiB"


def of_product(record: Record) -> list[str]:
    """Cells of FLOP/s and of their share of the matrix product's rate."""
    return [
        f"{record['flops_per_s'] / 1e9:.4g}",
        f"{share(record['share_of_matmul'])} ({share(record['share_of_matmul_frames'])})",
    ]


PRODUCT = ["GFLOP/s", "of the matrix product (whole frames)"]


def step_table(records: list[Record]) -> tuple[list[str], list[list[str]]]:
    phases = list(records[0]["phases"])
    columns = ["", "step", *phases, "tokens/s", *PRODUCT, "against the first"]
    if "routes_bytes" in records[0]:
        columns.append("routes: size, to the host and back")
    rows = []
    for record in records:
        parts = [seconds(record["phases"][phase]["seconds"]) for phase in phases]
        cells = [record["name"], seconds(record["seconds"]), *parts, f"{record['tokens_per_s']:.0f}"]
        cells += [*of_product(record), ratio(record, records[0])]
        if "routes_bytes" in record:
            copied = seconds(record["routes_copy_seconds"])
            cells.append(f"{record['routes_bytes'] / 1024:.3g} KiB, {copied}")
        rows.append(cells)
    return columns, rows


def rollout_table(records: list[Record]) -> tuple[list[str], list[list[str]]]:
    columns = ["", "rollout", "length: mean, max", "passes", "ms per pass", "ms per pass, against the first",
               "FLOPs per pass, against the first", "tokens/s", "tokens/s, against the first", "GB/s needed",
               "of the copy", *PRODUCT]  # fmt: skip
    first, rows = records[0], []
    for record in records:
        flops = [r["flops_needed"] / r["decode_passes"] for r in (record, first)]
        lengths = record["completions"]
        rows.append([
            record["name"], seconds(record["seconds"]), f"{lengths['mean']:.1f}, {lengths['max']}",
            f"{record['decode_passes']:.0f}", f"{1e3 * record['seconds_per_pass']:.3g}",
            f"{record['seconds_per_pass'] / first['seconds_per_pass']:.2f}", f"{flops[0] / flops[1]:.2f}",
            f"{record['tokens_per_s']:.0f}", f"{record['tokens_per_s'] / first['tokens_per_s']:.2f}",
            f"{record['bytes_per_s'] / 1e9:.3g}", share(record["share_of_copy"]), *of_product(record),
        ])  # fmt: skip
    return columns, rows


def part_table(records: list[Record]) -> tuple[list[str], list[list[str]]]:
    """Log-probs, updates, layers."""
    with_passes = "forward_backward" in records[0]
    columns = ["", "seconds", *PRODUCT, "against the first"]
    if with_passes:
        columns += ["optimizer, each", "forward and backward: of the matrix product (whole frames)"]
        columns += ["program: arguments, temporaries", "one [B, T, V] float32 array", "peak: device, process"]
    rows = []
    for record in records:
        cells = [record["name"], seconds(record["seconds"]), *of_product(record), ratio(record, records[0])]
        if with_passes:
            program, memory = record["program"], record["memory"]
            cells += [
                seconds(record["optimizer_seconds"]), of_product(record["forward_backward"])[1],
                f"{gib(program['argument_bytes'])}, {gib(program['temporary_bytes'])}", gib(record["logits_bytes"]),
                f"{gib(memory['device_bytes'])}, {gib(memory['rss_bytes'])}",
            ]  # fmt: skip
        rows.append(cells)
    return columns, rows


def losses_table(records: list[Record]) -> tuple[list[str], list[list[str]]]:
    rows = [[r["name"], seconds(r["seconds"]), f"{r['share_of_update']:.2%}"] for r in records]
    return ["", "loss, gradient and metrics", "of an update"], rows


def compile_table(records: list[Record]) -> tuple[list[str], list[list[str]]]:
    columns = ["process", "to the end of its first step", "imports", "programs", "of them from the cache",
               "tracing", "lowering", "compiling"]  # fmt: skip
    rows = [
        [r["name"], seconds(r["seconds"]), seconds(r["import_seconds"]), f"{r['programs']:.0f}",
         f"{r['from_cache']:.0f}", *(f"{r[name]:.2f} s" for name in ("trace_s", "lower_s", "compile_s"))]
        for r in records
    ]  # fmt: skip
    return columns, rows


def peers_table(records: list[Record]) -> tuple[list[str], list[list[str]]]:
    """Of each model: ours and the other systems, and ours against the fastest of them."""
    names = ("step", "rollout", "old_logps", "update", "first_cold", "first_warm")
    columns = ["model", "system", "step", "rollout", "old log-probs", "update", "first step: cold process",
               "second process", "times as fast as the fastest peer"]  # fmt: skip
    rows = []
    for record in records:
        cells = [seconds(record[name]) if record.get(name) else "-" for name in names]
        faster = record.get("times_as_fast")
        told = ", ".join(f"{name} {value:.2f}" for name, value in faster.items()) if faster else ""
        rows.append([record["model"], record["system"], *cells, told])
    return columns, rows


def ratio(record: Record, first: Record) -> str:
    return f"{record['seconds']['median'] / first['seconds']['median']:.3f}"


TABLES = {
    "step": step_table,
    "replay": step_table,
    "rollout": rollout_table,
    "logprob": part_table,
    "update": part_table,
    "moe": part_table,
    "objectives": losses_table,
    "compile": compile_table,
    "peers": peers_table,
}


def table(result: Record) -> str:
    """One result as Markdown: where it comes from, then its table."""
    columns, rows = TABLES[result["what"]](result["records"])
    return f"{origin(result)}\n\n{markdown(rows, columns)}"


def origin(result: Record) -> str:
    """One line: command, hardware, versions, date, commit, and what the machine could do in the same run."""
    where = result["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    devices = f"{where['devices']} {where['platform']} device(s)" + (
        f" ({where['device']})" if where["device"] != where["platform"] else ""
    )
    parts = [
        f"`{result['command']}`", f"{where['cores']} cores of {where['cpu']}, {devices}",
        f"Python {where['python']}, {versions}", f"{where['date'][:10]}", f"commit {where['commit']}",
    ]  # fmt: skip
    parts += [f"{name}={value}" for name, value in where["variables"].items()]
    machine = result.get("machine")
    if machine:
        product, copy = machine["matmul_flops_per_s"] / 1e9, machine["copy_bytes_per_s"] / 1e9
        parts.append(f"matrix product {product:.4g} GFLOP/s, copy {copy:.3g} GB/s in the same run")
    return "; ".join(parts)


def results_in(folder: Path) -> dict[str, Record]:
    """The results of a folder by the names of their files."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def fill(text: str, results: dict[str, Record]) -> str:
    """A README with each of its places filled by the table of that name; a result that is not there was not
    measured."""

    def filled(place: re.Match) -> str:
        found = results.get(place[2])
        return f"{place[1]}{table(found) if found else f'Not measured here (no {place[2]}.json).'}\n{place[3]}"

    return PLACE.sub(filled, text)
