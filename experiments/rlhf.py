"""From demonstrations to a policy that follows a learned reward, in one command:

    python experiments/rlhf.py --config=configs/rlhf_tiny.py --workdir=runs/rlhf

For each seed: fine-tuning (sft), preferences by a hidden judge (preferences), a reward model (rm), then every arm of
the config against that model. Leaves table.md and rlhf.png, .pdf and .csv in the workdir: the model's reward and the
true one, both in deviations of what the fine-tuned policy gets, and their gap against the distance to it, which is what
over-optimisation looks like. Run again, it goes on where it was stopped.
"""

from pathlib import Path
from typing import Any

import numpy as np

from gspo import build, label, reward_model, sft
from gspo.parallel import distributed
from gspo.report import bands, campaign, tables
from gspo.report.arms import laid_over, slug
from gspo.report.evidence import LAST, smoothed
from gspo.report.plots import COLORS
from gspo.run import cli

COLUMNS = ("arm", "model's reward", "true reward", "gap", "true reward at its best", "KL per token", "right digits")


def main() -> None:
    config, workdir = cli.FLAGS.config, Path(cli.FLAGS.workdir)
    options = {"allow_changed_config": cli.FLAGS.allow_changed_config}
    accuracy, scales, runs = [], {}, []
    for seed in config.seeds:
        scales[seed], found = up_to_the_model(config, workdir / str(seed), seed, options)
        accuracy.append(found)
        runs += [arm_run(config, arm, workdir / str(seed), seed) for arm in config.arms]
    campaign.train_all(runs, workers=config.workers, **options)
    if not distributed.is_primary():
        return
    curves = {arm: [curve(run, scales[run.seed], config.hidden) for run in runs if run.arm == arm]
              for arm in config.arms}  # fmt: skip
    rows = [row(arm, own) for arm, own in curves.items()]
    shown = ", ".join(f"{found:.3f}" for found in accuracy)
    note = f"Held-out pair accuracy of the reward model, by seed: {shown}. Rewards in deviations of the start's.\n\n"
    (workdir / "table.md").write_text(note + tables.markdown(rows, COLUMNS))
    draw(curves, workdir / "rlhf.png")
    print(note.strip())
    tables.show(rows, COLUMNS)
    print(f"table: {workdir / 'table.md'}   figure: {workdir / 'rlhf.png'}")


# ---------------------------------------------------------------------------- the road


def up_to_the_model(config: Any, folder: Path, seed: int, options: dict[str, bool]) -> tuple[dict[str, float], float]:
    """Fine-tuning, preferences, reward model. Returns mean and deviation of the true reward of what the fine-tuned
    policy writes, and the model's accuracy on held-out pairs."""
    cold, pairs, model = (str(folder / name) for name in ("sft", "preferences", "rm"))
    tuned = laid_over(config.sft, {}, seed=seed)
    sft.train(build.sft_plan(tuned, cold), cold, title=f"fine-tuning, seed {seed}", **options)
    asked = laid_over(config.labels, {}, seed=seed, init_from=cold, judge=config.hidden)
    made = label.label(build.label_plan(asked, pairs), pairs, **options)
    learned = laid_over(config.reward_model, {}, seed=seed, init_from=cold)
    learned.task.name, learned.task.options = label.pairs_of(pairs), {}
    title = f"reward model, seed {seed}"
    line = reward_model.train(build.reward_model_plan(learned, model), model, title=title, **options)
    return made[config.labels.task.train_split], line["eval/accuracy"]


def arm_run(config: Any, arm: str, folder: Path, seed: int) -> campaign.Run:
    """The run of an arm: the model's reward is trained on, the true one is logged."""
    cold, rewards = folder / "sft", (f"reward_model:{folder / 'rm'}", config.hidden)
    own = laid_over(
        config.rl, config.arms[arm], seed=seed, init_from=str(cold), rewards=rewards, reward_weights=(1.0, 0.0)
    )
    return campaign.Run(arm, seed, folder / slug(arm), own, cold)


# ---------------------------------------------------------------------------- what came of it


def curve(run: campaign.Run, scale: dict[str, float], hidden: str) -> dict[str, np.ndarray]:
    """By rollout: the model's reward and the true one in deviations of the start, the share of right digits, KL."""
    lines = [line for line in run.lines if "loss" in line]
    model, truth, kl = (np.array([line[name] for line in lines])
                        for name in (f"rewards/{run.config.rewards[0]}", f"rewards/{hidden}", "kl"))  # fmt: skip
    return {"model": model, "truth": (truth - scale["mean"]) / scale["std"], "share": truth, "kl": kl}


def row(arm: str, curves: list[dict[str, np.ndarray]]) -> list[str]:
    """One row of the table: means over the last rollouts, and over seeds with their range."""
    over = lambda values, form="{:+.2f}": tables.cell(values, form)  # noqa: E731
    ends = {name: [float(each[name][-LAST:].mean()) for each in curves] for name in curves[0]}
    return [
        arm,
        over(ends["model"]),
        over(ends["truth"]),
        over([a - b for a, b in zip(ends["model"], ends["truth"], strict=True)]),
        over([float(smoothed(each["truth"]).max()) for each in curves]),
        over(ends["kl"], "{:.3f}"),
        over(ends["share"], "{:.3f}"),
    ]


def draw(curves: dict[str, list[dict[str, np.ndarray]]], out: Path) -> None:
    """Both rewards over training, and the gap against the distance: means over seeds, each seed as a thin line, all
    smoothed over 5 rollouts; arms with a penalty dashed, their dots hollow."""
    figure, axes = bands.new_figure(1, 3, width=3.7)
    methods, rows = list(dict.fromkeys(arm.partition(" ")[0] for arm in curves)), []
    for arm, own in curves.items():
        style = {"color": COLORS[methods.index(arm.partition(" ")[0])], "linestyle": "--" if "+" in arm else "-"}
        smooth = [{name: smoothed(values) for name, values in each.items()} for each in own]
        mean = {name: np.mean([each[name] for each in smooth], axis=0) for name in smooth[0]}
        for each in smooth:
            axes[0].plot(each["model"], **style, alpha=0.3, linewidth=0.6)
            axes[1].plot(each["truth"], **style, alpha=0.3, linewidth=0.6)
            gap, color = each["model"] - each["truth"], style["color"]
            face = "none" if "+" in arm else color
            axes[2].scatter(each["kl"], gap, s=9, facecolors=face, edgecolors=color, linewidths=0.6)
        axes[0].plot(mean["model"], **style, linewidth=1.6, label=f"{arm} (n = {len(own)})")
        axes[1].plot(mean["truth"], **style, linewidth=1.6)
        for rollout in range(len(mean["kl"])):
            numbers = {name: f"{values[rollout]:.6g}" for name, values in mean.items()}
            rows.append({"arm": arm, "rollout": str(rollout), **numbers})
    axes[0].set(xlabel="Rollout", ylabel="Model's reward [std of start]")
    axes[1].set(xlabel="Rollout", ylabel="True reward [std of start]")
    axes[2].set(xlabel="KL to the start, per token [nats]", ylabel="Model's - true [std of start]")
    axes[2].set_xscale("log")
    axes[1].sharey(axes[0])
    bands.save(figure, axes, rows, out)


if __name__ == "__main__":
    cli.define_flags()
    cli.run(main, needs="hidden")
