"""Runs that are compiled for slices of TPUs, without a TPU: what fits, and what grows with the number of chips.

python experiments/aot.py --config=configs/aot.py --workdir=runs/aot

Leaves in the workdir: one JSON file per slice (a slice that has one is not compiled again), table.md, scaling.png.
Needs libtpu."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
from ml_collections import ConfigDict

from gspo import build
from gspo.parallel import distributed
from gspo.report import aot
from gspo.report.plots import save_panels
from gspo.report.verdicts import checks
from gspo.run import cli
from gspo.steps import make_layout
from gspo.types import UserError

COLORS = {
    "experts": "#D55E00",
    "attention": "#0072B2",
    "head": "#009E73",
    "embedding": "#CC79A7",
    "parameters": "#E69F00",
    "feed-forward": "#56B4E9",
    "other": "0.6",
}
STEPS = ("rollout", "log-probs", "update")


def main() -> int:
    config, workdir = cli.FLAGS.config, Path(cli.FLAGS.workdir)
    unknown = [name for name in (*config.fit, *config.scaling) if name not in config.slices]
    if unknown:
        raise UserError(f"fit, scaling: no slice named {unknown[0]!r}; choose from {', '.join(config.slices)}")
    if not distributed.is_primary():
        return 0  # the compiler works for one process as well as for many
    workdir.mkdir(parents=True, exist_ok=True)
    found = {name: measured(config, name, workdir) for name in config.slices}
    text = "\n\n".join(section(config.slices[name].run, found[name]) for name in config.fit)
    (workdir / "table.md").write_text(text + "\n")
    draw([found[name] for name in config.scaling], workdir / "scaling.png")
    print(text)
    return 0 if all(holds for name in config.fit for holds, _ in found[name]["checks"]) else 1


def measured(config: ConfigDict, name: str, workdir: Path) -> dict:
    """The report of one slice, from its file or from the compiler."""
    path = workdir / f"{name}.json"
    if path.exists():
        return json.loads(path.read_text())
    entry = config.slices[name]
    if entry.run not in config.runs:
        raise UserError(f"slices.{name}.run={entry.run!r}: choose one of {', '.join(config.runs)}")
    run = config.runs[entry.run].copy_and_resolve_references()
    run.update(entry.changes)
    plan = build.rl_plan(run)
    layout = make_layout(plan.mesh, aot.devices_of(entry.topology))
    print(f"{name}: compiling for {entry.topology}", flush=True)
    costs = aot.report(plan, layout)
    numbers = aot.as_json(plan, layout, costs, entry.topology)
    numbers |= {"table": aot.table(costs, entry.topology), "checks": checks(plan, layout, costs, entry.topology)}
    path.write_text(json.dumps(numbers, indent=1) + "\n")
    return numbers


def section(run: str, numbers: dict) -> str:
    return f"**{run} on {numbers['topology']}** ({describe(numbers)})\n\n{numbers['table']}\n\n{verdicts(numbers)}"


def describe(numbers: dict) -> str:
    mesh = " x ".join(f"{axis}={size}" for axis, size in numbers["mesh"].items() if size > 1)
    c = numbers["config"]
    frame = f"({c['max_prompt_length']} + {c['max_completion_length']}) tokens"
    tokens = f"{c['num_prompts']} prompts x {c['num_generations']} x {frame}"
    versions = f"jax {numbers['jax']}, libtpu {numbers['libtpu']}"
    return f"mesh {mesh}, {tokens}, {c['updates_per_rollout']} updates; {versions}"


def verdicts(numbers: dict) -> str:
    return "\n".join(f"- {'yes' if holds else '**no**'}: {text}" for holds, text in numbers["checks"])


def draw(scaling: list[dict], out: Path) -> None:
    """FLOPs per device of each step, flat where work is shared evenly; and bytes of collectives per device, by what
    they serve."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained", width_ratios=(2, 3))
    chips = [numbers["devices"] for numbers in scaling]
    for step, color in zip(STEPS, ("#0072B2", "#E69F00", "#D55E00"), strict=True):
        flops = [numbers["steps"][step]["flops"] * numbers["steps"][step]["runs"] / 1e12 for numbers in scaling]
        ideal = [numbers["steps"][step]["ideal_flops"] * numbers["steps"][step]["runs"] / 1e12 for numbers in scaling]
        left.plot(chips, flops, "o-", color=color, label=step)
        left.plot(chips, ideal, "_", color="black", markersize=14, label="equal share" if step == STEPS[0] else None)
    left.set(xscale="log", xlabel="Chips", ylabel="TFLOPs per chip and rollout", ylim=(0, None))
    left.set_xticks(chips, map(str, chips))
    left.minorticks_off()
    sizes = {
        source: max(n["steps"][step]["sources"].get(source, 0) for n in scaling for step in STEPS) for source in COLORS
    }
    sources = [source for source, size in sizes.items() if size > 2**29]  # half a GiB: less would not be seen
    width, labels = 0.8, []
    for i, step in enumerate(STEPS):
        for j, numbers in enumerate(scaling):
            x, bottom = i * (len(scaling) + 1) + j, 0.0
            labels.append((x, str(numbers["devices"])))
            for source in sources:
                size = numbers["steps"][step]["sources"].get(source, 0) * numbers["steps"][step]["runs"] / 2**30
                right.bar(x, size, width, bottom=bottom, color=COLORS[source], label=source if i == j == 0 else None)
                bottom += size
        middle = i * (len(scaling) + 1) + (len(scaling) - 1) / 2
        right.text(middle, -0.2, step, ha="center", transform=right.get_xaxis_transform())
    right.set_xticks([x for x, _ in labels], [label for _, label in labels])
    right.set(ylabel="Collectives per chip and rollout [GiB]")
    right.text(-0.01, -0.09, "Chips", ha="right", transform=right.transAxes)
    save_panels(figure, (left, right), out)


if __name__ == "__main__":
    cli.define_flags()
    cli.run(main, needs="slices")
