"""The figures of experiments/paper.py: what stands in each panel, from as many seeds as there are."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gspo.report import bands
from gspo.report.evidence import LAST, START, final_reward
from gspo.report.ledger import Curves

Of = Callable[[str], Curves]  # arm -> its curves
METHODS = ("GRPO", "GRPO+R2", "GSPO", "GSPO+R2")
COLORS = bands.colors_of(METHODS)
COLORS |= {f"dense {name}": color for name, color in COLORS.items()}
PASS = "held-out pass@1"
SAID = {
    "collapsed": "Share of seeds that collapse",
    "experts changed per rollout at the start": f"The same, rollouts 1 to {START}",
}


def some(curves: Of, arms: dict[str, str]) -> dict[str, Curves]:
    """label -> arm, of those that have run."""
    return {label: curves(arm) for label, arm in arms.items() if curves(arm)}


def figure_1(curves: Of, setting: str, out: Path) -> None:
    """Fig. 1: training reward against rollouts and tokens, held-out pass@1; the dense twin below. setting: A, B, or
    best: B's models, each method at its own best rate and range."""
    moe = some(curves, {m: f"{setting} MoE {m}" for m in METHODS})
    dense = some(curves, {f"dense {m}": f"{setting} dense {m}" for m in ("GRPO", "GSPO")})
    figure, axes = bands.new_figure(2, 2)
    rows = bands.curve_panel(axes[0], moe, "reward", "Training reward, MoE", colors=COLORS)
    rows += bands.curve_panel(axes[1], moe, "reward", "Training reward, MoE", x="tokens", colors=COLORS)
    rows += bands.curve_panel(axes[2], dense, "reward", "Training reward, dense", colors=COLORS)
    ends = {label: [(i, own)] for i, (label, own) in enumerate((moe | dense).items())}
    rows += end_panel(axes[3], ends)
    for panel in axes[:3]:
        panel.set_ylim(0, 1)
    bands.save(figure, axes, rows, out, one_legend=True)


def end_panel(axes, ends: dict[str, list[tuple[float, Curves]]], colors: dict[str, str] | None = COLORS) -> bands.Rows:
    rows = bands.dial_panel(axes, ends, PASS, "Held-out pass@1 at the end", "arm", colors=colors)
    axes.set_xticks(range(len(ends)), ends, rotation=35, ha="right")
    axes.set(xlabel="", ylabel="Held-out pass@1", ylim=(0, 1))
    for line in axes.containers:
        line.set_label("_")  # the axis names them
    return rows


def figure_2(curves: Of, settings: tuple[str, ...], out: Path) -> None:
    """Fig. 2: share of clipped tokens."""
    figure, axes = bands.new_figure(1, len(settings))
    rows: bands.Rows = []
    for panel, setting in zip(axes, settings, strict=True):
        arms = some(curves, {m: f"{setting} MoE {m}" for m in ("GRPO", "GSPO")})
        arms |= some(curves, {f"dense {m}": f"{setting} dense {m}" for m in ("GRPO", "GSPO")})
        label = f"Clipped tokens, setting {setting} [%]"
        rows += bands.curve_panel(panel, arms, "clipped", label, factor=100, log=True, colors=COLORS)
        for line in panel.get_lines():
            if line.get_label().startswith("dense"):
                line.set_linestyle("--")
    bands.save(figure, axes, rows, out)


def figure_3(curves: Of, settings: tuple[str, ...], out: Path) -> None:
    """Fig. 3: GRPO with and without Routing Replay; experts changed over a rollout."""
    figure, axes = bands.new_figure(len(settings), 2)
    rows: bands.Rows = []
    for i, setting in enumerate(settings):
        arms = some(curves, {m: f"{setting} MoE {m}" for m in ("GRPO", "GRPO+R2")})
        label = f"Training reward, setting {setting}"
        rows += bands.curve_panel(axes[2 * i], arms, "reward", label, colors=COLORS)
        axes[2 * i].set_ylim(0, 1)
        label = f"Experts changed, setting {setting} [%]"
        rows += bands.curve_panel(axes[2 * i + 1], arms, "experts_changed", label, factor=100, colors=COLORS)
        axes[2 * i + 1].set_ylim(bottom=0)
    bands.save(figure, axes, rows, out)


def swept(model: str, method: str, rate: str, power: int) -> str:
    """The sweep's arm of a cell."""
    return f"{model} {method} lr {rate} clip 2^{power}"


def end_of(own: Curves) -> float:
    """By which a cell of the sweep is judged: training reward at the end, mean over the seeds."""
    return float(bands.matrix(own, "reward")[:, -LAST:].mean()) if own else float("nan")


def heat_maps(curves: Of, rates: tuple[str, ...], clips: tuple[int, ...], out: Path) -> None:
    """Learning rate x clip range, alike for both methods: training reward at the end, mean over the seeds."""
    figure, axes = bands.new_figure(2, 2, width=3.9)
    rows: bands.Rows = []
    for panel, (model, method) in zip(axes, itertools.product(("B MoE", "dense"), ("GRPO", "GSPO")), strict=True):
        cells = {(i, j): curves(swept(model, method, rates[i], clips[j]))
                 for i, j in np.ndindex(len(rates), len(clips))}  # fmt: skip
        table = np.reshape([end_of(own) for own in cells.values()], (len(rates), len(clips)))
        seeds = sorted({len(own) for own in cells.values() if own})
        names = [f"x {2.0**power:g}" for power in clips]
        labels = ("Learning rate", "Clip range")
        title = f"{model} {method} (n = {' to '.join(map(str, seeds)) or 0})"
        rows += bands.heat_panel(panel, table, list(rates), names, title, labels=labels)
    bands.save(figure, axes, rows, out)


def gains(curves: Of, rates: tuple[str, ...], clips: tuple[int, ...], out: Path) -> None:
    """What GSPO gains over GRPO at each learning rate of the sweep, on the MoE and on its dense twin, and the
    interaction: the one minus the other. A number for each seed and clip range."""

    def gained(model: str, rate: str) -> dict[tuple[int, int], float]:
        """(clip range, seed) -> the gain."""
        found = {}
        for power in clips:
            grpo, gspo = (curves(swept(model, method, rate, power)) for method in ("GRPO", "GSPO"))
            found |= {(power, s): final_reward(gspo[s]) - final_reward(grpo[s]) for s in sorted({*grpo} & {*gspo})}
        return found

    shown: dict[str, list[tuple[float, np.ndarray]]] = {"MoE": [], "dense twin": [], "MoE - dense twin": []}
    for rate in rates:
        moe, dense = gained("B MoE", rate), gained("dense", rate)
        both = {key: gain - dense[key] for key, gain in moe.items() if key in dense}
        for values, places in zip((moe, dense, both), shown.values(), strict=True):
            if values:
                places.append((float(rate), np.array(list(values.values()))))
    interaction = {"MoE - dense twin": shown.pop("MoE - dense twin")}
    figure, axes = bands.new_figure(1, 2, width=4.0)
    rows = bands.value_panel(axes[0], shown, "GSPO - GRPO, reward at the end", "Learning rate")
    rows += bands.value_panel(
        axes[1], interaction, "Interaction", "Learning rate", colors=dict.fromkeys(interaction, "0.25")
    )
    for panel in axes:
        panel.axhline(0, color="0.6", linewidth=0.8)
        panel.set_xscale("log")
        panel.set_xticks([float(rate) for rate in rates], rates)
        panel.minorticks_off()
    bands.save(figure, axes, rows, out)


def dose_response(curves: Of, doses: tuple[int, ...], out: Path) -> None:
    """Reward and collapse against what the routers' rate is multiplied by, and the placebo."""
    figure, axes = bands.new_figure(2, 2)
    x = "Learning rate of the routers over the rest"
    routers = {m: [(d, curves(f"router x{d} {m}")) for d in doses] for m in (*METHODS, "RSPO")}
    placebo = {f"{model} {m}": [(d, curves(f"query x{d} {model} {m}")) for d in doses]
               for model in ("MoE", "dense") for m in ("GRPO", "GSPO")}  # fmt: skip
    rows = bands.dial_panel(axes[0], routers, PASS, "Held-out pass@1 at the end", x)
    rows += bands.dial_panel(axes[1], routers, "experts changed per update", "Experts changed [%]", x, factor=100)
    rows += bands.dial_panel(axes[2], routers, "collapsed", SAID["collapsed"], x)
    rows += bands.dial_panel(axes[3], placebo, PASS, "Held-out pass@1 at the end", f"{x.replace('routers', 'queries')}")
    for panel in axes:
        panel.set_xscale("symlog", linthresh=1)
        panel.set_xticks(doses, [f"{d}" for d in doses])
    bands.save(figure, axes, rows, out)


def staleness(curves: Of, updates: tuple[int, ...], out: Path) -> None:
    """Updates per rollout x replay, with one program for both and with a sampler that differs."""
    figure, axes = bands.new_figure(1, 2, width=4.2)
    exact = {m: [(n, curves(f"{n} updates {m}")) for n in updates] for m in METHODS}
    names = [f"{m}{r}" for m in ("GRPO", "GSPO") for r in ("", "+R2", "+R3")]
    other = {m: [(n, curves(f"{n} updates mismatch {m}")) for n in updates] for m in names}
    rows = bands.dial_panel(axes[0], exact, PASS, "Pass@1, exact sampler", "Updates per rollout")
    rows += bands.dial_panel(axes[1], other, PASS, "Pass@1, int8, noisy routers", "Updates per rollout")
    for panel in axes:
        panel.set_xscale("log", base=2)
        panel.set_xticks(updates, [f"{n}" for n in updates])
        panel.set_ylim(0, 1)
    bands.save(figure, axes, rows, out)


def length(curves: Of, digits: tuple[int, ...], out: Path) -> None:
    """Learning, the variance of log-ratios and clipped tokens against the length of completions."""
    figure, axes = bands.new_figure(1, 3)
    arms = {m: [(n, curves(f"{n} digits {m}")) for n in digits] for m in ("GRPO", "GSPO", "sum")}
    x = "Digits"
    rows = bands.dial_panel(axes[0], arms, PASS, "Held-out pass@1 at the end", x)
    rows += bands.dial_panel(axes[1], arms, "log10 of the variance of log s", "log10 of the variance of log s", x)
    rows += bands.dial_panel(axes[2], arms, "orders of magnitude of clipped tokens", "log10 of clipped tokens", x)
    for panel in axes:
        panel.set_xscale("log", base=2)
        panel.set_xticks(digits, [f"{n}" for n in digits])
    bands.save(figure, axes, rows, out)


def depth(curves: Of, layers: tuple[int, ...], out: Path) -> None:
    """Experts changed against the number of layers, over the run and at its start; learning."""
    figure, axes = bands.new_figure(2, 2)
    arms = {m: [(n, curves(f"{n} layers {m}" if n != 4 else f"B MoE {m}")) for n in layers] for m in ("GRPO", "GSPO")}
    rows: bands.Rows = []
    changed = "experts changed per rollout"
    for panel, name in zip(axes, (changed, f"{changed} at the start", PASS, "collapsed"), strict=True):
        rows += bands.dial_panel(panel, arms, name, SAID.get(name, name.capitalize()), "Layers")
        panel.set_xticks(layers)
        panel.set_ylim(bottom=0)
    bands.save(figure, axes, rows, out)


def compared(curves: Of, labels: dict[str, str], out: Path) -> None:
    """Arms beside each other: training reward, clipped tokens, and held-out pass@1 at the end. labels: label -> arm."""
    arms = some(curves, labels)
    figure, axes = bands.new_figure(1, 3, height=3.4)
    rows = bands.curve_panel(axes[0], arms, "reward", "Training reward")
    rows += bands.curve_panel(axes[1], arms, "clipped", "Clipped tokens [%]", factor=100, log=True)
    rows += end_panel(axes[2], {label: [(i, own)] for i, (label, own) in enumerate(arms.items())}, colors=None)
    axes[0].set_ylim(0, 1)
    bands.save(figure, axes, rows, out, one_legend=True)


def _of_seeds(curves: Of, seeds: tuple[int, ...]) -> Of:
    """Arms that have more seeds, since they stand in other figures, with those of this one."""
    return lambda arm: {seed: own for seed, own in curves(arm).items() if seed in seeds}


def labels_of(config, figure: str) -> dict[str, str]:
    """label -> arm, of a figure in COMPARED: an arm is called as this figure calls it, whatever name it runs under."""
    beside, known = COMPARED[figure]
    here = {own: name for name, own in config.same.items() if name.startswith(known)}
    labels = {}
    for arm in (*beside, *config.figures[figure].arms):
        name = arm if arm.startswith(known) else here.get(arm, arm)
        label = name.removeprefix(known).replace(" clip 2^-2", ", ranges / 4").replace(" clip 2^2", ", ranges x 4")
        labels[label] = arm
    return labels


COMPARED = {  # figure of the config -> what stands in it beside its own arms, and what its labels need not say
    "clips": (("B MoE GRPO", "B MoE GSPO"), "B MoE "),
    "objectives": (("B MoE GRPO", "B MoE GSPO"), "B MoE "),
    "old_logps": ((), "old by "),  # each method with the sampler's log-probs and with the learner's
    "again": ((), "B MoE "),
}


def draw_all(curves: Of, config, folder: Path) -> list[Path]:
    """Every figure of which something has run, and against a dial at two places or more. Returns the figures, without
    their endings."""
    settings = tuple(s for s in ("A", "B") if curves(f"{s} MoE GRPO"))
    names, drawn = [*config.arms, *config.same], []

    def to(name: str) -> Path:
        drawn.append(folder / name)
        return drawn[-1]

    for setting in (*settings, *(["best"] if curves("best MoE GRPO") else [])):
        figure_1(curves, setting, to(f"fig1_{setting.lower()}"))
    if settings:
        figure_2(curves, settings, to("fig2"))
        figure_3(curves, settings, to("fig3"))
    cells = [name.split(" lr ")[1].split(" clip 2^") for name in names if " lr " in name and curves(name)]
    if cells:
        rates = sorted({rate for rate, _ in cells}, key=float)
        clips = sorted({int(power) for _, power in cells})
        for name, draw in (("sweep", heat_maps), ("gains", gains)):
            draw(curves, tuple(rates), tuple(clips), to(name))
    doses = {int(name.split()[1][1:]) for name in names if name.startswith("router x") and curves(name)}
    if len(doses) > 1:
        dose_response(_of_seeds(curves, config.figures["dose"].seeds), tuple(sorted(doses)), to("dose"))
    for name, draw, kind in (
        ("staleness", staleness, "updates"),
        ("length", length, "digits"),
        ("depth", depth, "layers"),
    ):
        places = {int(arm.split()[0]) for arm in names if arm.split()[1] == kind and curves(arm)}
        if len(places) > 1:
            places |= {4} if kind == "layers" else set()
            draw(_of_seeds(curves, config.figures[name].seeds), tuple(sorted(places)), to(name))
    for name in COMPARED:
        if name in config.figures and any(curves(arm) for arm in config.figures[name].arms):
            compared(_of_seeds(curves, config.figures[name].seeds), labels_of(config, name), to(name))
    return drawn
