"""Asks of recorded rollouts what each objective would have done: gradients, clips, and the variance of log w.

python experiments/lab.py --config=configs/lab.py --workdir=runs/lab --config.rollouts=runs/gspo

The runs must have recorded their tokens (log.tokens_every) and kept the checkpoint before each such rollout. What is
computed: gspo/report/lab.py. Leaves in the workdir lab.csv (a line for each run, rollout, update, replay and
objective), table.md (means), and as PNG and PDF cosine (GRPO's gradient against GSPO's over training), kinds (share of
the squared norm by kind of layer) and variance (share of the variance of log w on tokens whose experts changed).
replay_error in lab.csv is the largest difference of a log-prob between the policy that the updates, made again, end in
and the one on record: it says how exactly the policies of training were met. configs/lab_paper.py trains its runs
first.
"""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from configs import from_run
from gspo import build, objectives
from gspo.learning.learner import Update
from gspo.parallel import distributed
from gspo.report import arms, bands, lab, tables
from gspo.report.plots import COLORS, short_names
from gspo.run import cli, tokens
from gspo.run.checkpoint import restore_state
from gspo.run.identity import dated_tokenizer
from gspo.steps import initial_state, make_layout, make_steps, rows_per_prompt_of
from gspo.types import UserError

Row = dict[str, Any]
# Of the table, what a terminal has room for.
SHOWN = ("run", "replay", "objective", "grad_norm", "cosine/grpo", "share/routers", "clipped_tokens", "ess")
SHOWN += ("changed_share",)


def main() -> None:
    config, workdir = cli.FLAGS.config, Path(cli.FLAGS.workdir)
    for name in config.objectives:
        check_objective(name)
    if "figures" in config:
        folders = arms.trained(config, workdir, allow_changed_config=cli.FLAGS.allow_changed_config)
    else:
        named = [Path(part.strip()) for part in config.rollouts.split(",") if part.strip()]
        folders = {name: [folder] for name, folder in zip(short_names(named), named, strict=True)}
    if not folders:
        raise UserError("config.rollouts: name the workdir of a run that has recorded tokens, or several, with commas")
    if not distributed.is_primary():
        return
    rows: list[Row] = []
    for arm, seeds in folders.items():
        for folder in seeds:
            rows += rows_of_run(arm, folder, config)
    workdir.mkdir(parents=True, exist_ok=True)
    bands.write_csv(rows, workdir / "lab.csv")
    table = table_of(rows)
    (workdir / "table.md").write_text(tables.markdown(*table))
    draw(rows, workdir)
    cells, columns = table
    narrow = [columns.index(name) for name in SHOWN if name in columns]
    tables.show([[row[i] for i in narrow] for row in cells], [columns[i] for i in narrow])
    print(f"numbers: {workdir / 'lab.csv'}   table: {workdir / 'table.md'}   figures: cosine, kinds, variance")


def check_objective(name: str) -> None:
    try:
        objectives.settings(name)
    except UserError as error:
        raise UserError(f"config.objectives: {error}") from None


# ---------------------------------------------------------------------------- one run


def rows_of_run(arm: str, folder: Path, config: Any) -> list[Row]:
    """Raises UserError for what is no run, has no records, or does not know the policies any more."""
    if not (folder / "config.json").is_file():
        raise UserError(f"config.rollouts={folder}: it holds no config.json; name the --workdir of a run")
    found = tokens.files(folder)
    if not found:
        raise UserError(
            f"config.rollouts={folder}: it has no record of tokens; train it with --config.log.tokens_every=N"
        )
    written = json.loads((folder / "config.json").read_text())
    if "num_rollouts" not in written:
        raise UserError(f"config.rollouts={folder}: no run of experiments/rl.py; name one")
    own = from_run.get_config(str(folder))
    own.init_from = written["init_from"]
    plan = build.rl_plan(own, str(folder))
    if plan.critic or plan.experience.replay == "R3" or plan.rollout.stale_rollouts or plan.lora:
        raise UserError(
            f"config.rollouts={folder}: runs with a critic, R3, stale rollouts or adapters cannot be made again; "
            "name others"
        )
    tokenizer = dated_tokenizer(plan.data.tokenizer, plan.date)
    steps = make_steps(plan, make_layout(plan.mesh), tokenizer)
    measures = {name: measure_of(plan, steps, name, config) for name in config.objectives}
    records = {rollout: record_of(folder, rollout, paths, plan) for rollout, paths in found.items()}
    rows = []
    for rollout, record in records.items():
        state = state_before(folder, rollout, steps) if rollout else initial_state(plan, steps.start)
        named = {"run": arm, "seed": plan.seed, "rollout": rollout}
        rows += [
            named | row for row in rows_of_rollout(folder, plan, steps, tokenizer, state, record, measures, config)
        ]
    return rows


def record_of(folder: Path, rollout: int, paths: list[Path], plan: Any) -> tokens.Record:
    """Raises UserError for a record that cannot be read, is of another run, or whose policy is gone."""
    try:
        record = tokens.read(paths)
    except UserError as error:
        raise UserError(f"config.rollouts={folder}: {error}") from None
    if record.about["rollout"] != rollout or record.about["objective"] != json.loads(json.dumps(dict(plan.objective))):
        raise UserError(f"config.rollouts={folder}: the record of rollout {rollout} is of another run; remove it")
    if rollout and not (folder / "checkpoints" / str(rollout)).is_dir():
        raise UserError(
            f"config.rollouts={folder}: the checkpoint of rollout {rollout} is gone; train with checkpoint.every and "
            "checkpoint.keep_last that keep it, or remove the record"
        )
    return record


def state_before(folder: Path, rollout: int, steps: Any) -> Any:
    try:
        return restore_state(folder / "checkpoints" / str(rollout), steps.abstract.saved)
    except UserError as error:
        raise UserError(f"config.rollouts={folder}: {error}; or remove the record of rollout {rollout}") from None


def measure_of(plan: Any, steps: Any, name: str, config: Any) -> Any:
    """`lab.make_measure` of a preset: as the run has it where it is the run's own."""
    if name == plan.preset:
        objective = steps.objective
    else:
        low, high = config.epsilons.get(name, (None, None))
        objective = objectives.preset(name, epsilon=low, epsilon_high=high)
    update = Update(
        steps.model,
        optax.identity(),  # nothing is updated
        objective,
        plan.update,
        plan.rollout.sampling,
        rows_per_prompt=rows_per_prompt_of(plan, steps.layout),
    )
    if "old_router_logp_LBCX" in objective.needs:
        raise UserError(f"config.objectives: {name!r} needs what records do not hold; leave it out")
    return lab.make_measure(update)


def rows_of_rollout(folder, plan, steps, tokenizer, state, record, measures, config) -> list[Row]:
    """Makes the updates of a recorded rollout again, and measures at those that are asked for."""
    data = plan.data
    batch = lab.batch_of(record, data.max_prompt_length, data.max_completion_length, tokenizer.pad_id)
    frames = (jnp.asarray(batch.tokens_BT), jnp.asarray(batch.prompt_lengths_B))
    old = steps.scorer(state.policy, *frames)
    gaps = np.abs(np.asarray(old.logp_BC) - batch.inputs.old_logp_BC)[batch.inputs.mask_BC]
    if len(gaps) and np.quantile(gaps, 0.999, method="lower") > (plan.check_tolerance or 0.1):
        raise UserError(
            f"config.rollouts={folder}: the record of rollout {record.about['rollout']} is not of the policy in its "
            "checkpoint; remove it"
        )
    routes, replays = old.free_routes_LBTX, plan.experience.replay == "R2"
    batch = batch.replace(old_routes_LBTX=routes, replayed_routes_LBTX=routes if replays else None)
    N = plan.updates_per_rollout
    wanted, rows = tuple(config.updates) or tuple(sorted({0, N // 2, N - 1})), []
    if not set(wanted) <= set(range(N)):
        raise UserError(f"config.updates={wanted}: the runs make {N} updates per rollout; give numbers from 0 on")
    for j, part in enumerate(steps.minibatches(batch)):
        if j in wanted:
            for replay in (False, True) if routes is not None else (False,):
                given = part.replace(replayed_routes_LBTX=part.old_routes_LBTX if replay else None)
                found = rows_of_update(state, given, measures)
                rows += [{"update": j, "replay": "on" if replay else "off"} | row for row in found]
        state, _ = steps.train_step(state, part)
    after = steps.scorer(state.policy, *frames, batch.replayed_routes_LBTX)
    real_BC = np.arange(data.max_completion_length) < np.asarray(batch.completion_lengths_B)[:, None]
    error = np.abs(np.asarray(after.logp_BC)[real_BC] - record.columns["after_logp"]).max()
    return [row | {"replay_error": float(error) if plan.num_iterations == 1 else float("nan")} for row in rows]


def rows_of_update(state, part, measures) -> list[Row]:
    """One row for each objective."""
    kinds_N = lab.kinds_of(state.params)
    found, scores = {}, None
    for name, measure in measures.items():
        found[name], scores = measure(state, part)
    mask_BC = np.asarray(part.inputs.mask_BC)
    log_w_N = (np.asarray(scores.logp_BC, np.float64) - np.asarray(part.inputs.old_logp_BC, np.float64))[mask_BC]
    common = {"token_ess": lab.ess(log_w_N)}
    if scores.free_routes_LBTX is not None:
        old = np.asarray(part.old_routes_LBTX)
        changed_BC = lab.routes_changed(old, np.asarray(scores.free_routes_LBTX), mask_BC.shape[1])
        common |= lab.split_variance(log_w_N, changed_BC[mask_BC])
    rows = []
    for name, (gradient_N, metrics) in found.items():
        row = {"objective": name, "grad_norm": float(np.linalg.norm(gradient_N))}
        row |= {f"cosine/{other}": lab.cosine(gradient_N, each.gradient_N) for other, each in found.items()}
        row |= {f"share/{kind}": share for kind, share in lab.shares(gradient_N, kinds_N).items()}
        row |= {"clipped_tokens": metrics["clip_ratio/tokens"], "clipped_sequences": metrics["clip_ratio/sequences"]}
        rows.append(row | {"ess": metrics["ess"]} | common)
    return rows


# ---------------------------------------------------------------------------- what is left of it


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
    kinds = [kind for kind in lab.KINDS if any(row[f"share/{kind}"] > 0 for row in rows)]
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


if __name__ == "__main__":
    cli.define_flags()
    cli.run(main, needs="rollouts")
