"""Routing drift during training, and routing replay under injected mismatch between sampler and learner.

python experiments/routing_drift.py --config=configs/routing_drift.py --workdir=runs/routing_drift

Leaves drift.png (routing change per update; variance of token and sequence log-ratios by length), replay.md and load.md
(tables: replay under mismatch; the load of experts by layer), and the runs. The cold start may begin with an upcycled
model (scripts/upcycle.py): --config.cold_start.init_from=RUN --config.cold_start.router_aux_loss_coef=0.01.

Found (seed 0, 4 layers, 8 experts of which 2 run): one update moves 0.8% of the routers' choices, three move 2.0%, at
most 4.4%, the last layer 3.7 times as many as the first; the 13% of tokens with a moved choice carry 28% of the
variance of token log- ratios. The variance of log s falls as 1/length, as for independent tokens, while that of token
log-ratios does not fall: what a sequence ratio gains is averaging. Replaying the sampler's routes (R3) shrinks the gap
between sampler and learner (k3) 3 to 6 times where noisy routers or rounding cause it, closes it where experts were
swapped, and does not where parameters are stale; replaying the learner's own (R2) leaves that gap alone. Either lowers
the variance of token log-ratios during the updates by about a fifth to a half. Not run on a GPU-sized MoE.
"""

import json
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
from ml_collections import ConfigDict

from gspo import build, rl, sft
from gspo.parallel import distributed
from gspo.report import tables
from gspo.report.arms import laid_over
from gspo.report.plots import save_panels, series
from gspo.run import cli
from gspo.run.progress import Timer
from gspo.run.writers import read_jsonl
from gspo.steps import initial_state

COLUMNS = (
    "sampler",
    "replay",
    "experts that differ: sampler, learner",
    "experts replayed otherwise",
    "sampler-learner k3",
    "max |Δ log p|",
    "token log-ratio variance",
)


def main() -> None:
    config, workdir = cli.FLAGS.config, Path(cli.FLAGS.workdir)
    options = {"allow_changed_config": cli.FLAGS.allow_changed_config}
    cold = workdir / "cold"
    sft.train(build.sft_plan(config.cold_start, str(cold)), str(cold), title="cold start", **options)

    drift = laid_over(config.base, {}, init_from=str(cold))
    rl.train(build.rl_plan(drift, str(workdir / "drift")), str(workdir / "drift"), title="drift", **options)
    by_length = variance_by_length(drift, rollouts=config.mismatch_rollouts)
    if distributed.is_primary():
        (workdir / "by_length.json").write_text(json.dumps(by_length))
        lines = read_jsonl(workdir / "drift" / "metrics.jsonl")
        draw(lines, by_length, drift.updates_per_rollout, workdir / "drift.png")
        load = tables.load_by_layer({"cold start": tables.lines_of(cold, "metrics.jsonl"), "drift": lines})
        (workdir / "load.md").write_text(tables.markdown(*load))

    rows = []
    for injection, mismatch in config.injections.items():
        for mode in config.modes:
            arm = laid_over(
                config.base, {"mismatch": mismatch}, num_rollouts=config.mismatch_rollouts, init_from=str(cold)
            )
            arm.router_replay.mode = mode
            arm.eval.num_prompts = arm.num_prompts
            arm.optimizer.update(schedule="constant", warmup_steps=config.base.updates_per_rollout)
            folder = workdir / f"{injection} {mode}".replace(" ", "_").replace("%", "")
            rl.train(build.rl_plan(arm, str(folder)), str(folder), title=f"{injection}, {mode}", **options)
            if distributed.is_primary():
                rows.append(row(injection, mode, read_jsonl(folder / "metrics.jsonl")))
                (workdir / "replay.md").write_text(tables.markdown(rows, COLUMNS))
    if distributed.is_primary():
        tables.show(rows, COLUMNS)


def row(injection: str, mode: str, lines: tables.Lines) -> list[str]:
    """Means over the rollouts. Under R3 the experts that run are the sampler's, by definition none of them is replayed
    otherwise."""

    def mean(name: str, form: str) -> str:
        return tables.cell([tables.mean(lines, name)], form)

    differ = mean("routing/sampler_experts_changed", "{:.2%}")
    return [
        injection,
        mode,
        differ,
        "0%" if mode == "R3" else differ,
        mean("sampler/k3", "{:.2e}"),
        mean("sampler/abs_max", "{:.3f}"),
        mean("log_ratio/token_var", "{:.2e}"),
    ]


def variance_by_length(config: ConfigDict, rollouts: int) -> dict[str, list[float]]:
    """Variance of token log-ratios and of log s_i, over prefixes of the completions of 1, 2, ... tokens, after 3
    updates of a rollout.

    A prefix of n tokens stands for a completion of length n: log s is then the mean of its n token log-ratios.
    """
    plan = build.rl_plan(config)
    run = rl.prepare(plan)
    state = initial_state(plan, run.steps.start)
    key = jax.random.fold_in(jax.random.key(config.seed), rl.ROLLOUT_STREAM)
    token_parts, cursor = [], 0
    for index in range(rollouts):
        experience = run.collector(state, cursor, jax.random.fold_in(key, index), Timer())
        cursor = experience.next_cursor
        for j, part in enumerate(run.steps.minibatches(experience.batch)):
            if j == config.updates_per_rollout - 1:
                now = run.steps.scorer(state.policy, part.tokens_BT, part.prompt_lengths_B)
                held = (now.logp_BC, part.inputs.old_logp_BC, part.inputs.mask_BC)
                now_BC, old_BC, mask_BC = distributed.fetch(held)
                token_parts.append(np.where(mask_BC, now_BC - old_BC, np.nan))
            state, _ = run.steps.train_step(state, part)
    gaps_BC = np.concatenate(token_parts)
    lengths = range(1, int(np.nanmax(np.sum(~np.isnan(gaps_BC), axis=1))) + 1)
    whole = [gaps_BC[~np.isnan(gaps_BC[:, n - 1])][:, :n] for n in lengths]
    return {
        "length": [n for n, rows in zip(lengths, whole, strict=True) if len(rows) > 50],
        "token": [float(rows.var()) for rows in whole if len(rows) > 50],
        "sequence": [float(rows.mean(axis=1).var()) for rows in whole if len(rows) > 50],
    }


def draw(lines: tables.Lines, lengths: dict[str, list[float]], updates: int, out: Path) -> None:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
    for name, label, color in (
        ("routing/experts_changed_per_update", "after 1 update", "#56B4E9"),
        ("routing/experts_changed", f"after {updates - 1} updates", "#0072B2"),
    ):
        steps, changed = series(lines, name)
        left.plot(steps, 100 * changed, color=color, label=label)
    left.set(xlabel="Rollout", ylabel="Experts changed [%]", ylim=(0, None))
    name = "routing/experts_changed_by_layer"
    steps, layers = zip(*[(line["step"], line[name]) for line in lines if name in line], strict=True)
    layers = np.array(layers)
    for layer in range(layers.shape[1]):
        shade = plt.get_cmap("viridis")(layer / max(layers.shape[1] - 1, 1) * 0.85)
        middle.plot(steps, 100 * layers[:, layer], color=shade, label=f"layer {layer + 1}")
    middle.set(xlabel="Rollout", ylabel="Experts changed, by layer [%]", ylim=(0, None))
    right.plot(lengths["length"], lengths["token"], color="#D55E00", label="token log-ratios")
    right.plot(lengths["length"], lengths["sequence"], color="#0072B2", label="log s, the sequence's mean")
    reference = np.array(lengths["token"]) / np.array(lengths["length"])
    right.plot(lengths["length"], reference, color="0.6", linestyle="--", label="token variance / length")
    right.set(xlabel="Length [tokens]", ylabel="Variance of log-ratio", yscale="log")
    save_panels(figure, (left, middle, right), out)


if __name__ == "__main__":
    cli.define_flags()
    cli.run(main, needs="injections")
