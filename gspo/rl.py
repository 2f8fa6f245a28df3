"""Reinforcement learning: rollout -> rewards -> advantages -> several updates against a fixed old policy. Start reading here.

    for each rollout
        sample G completions per prompt from the policy, with their log-probs and routes
        score them with verifiable rewards; compare each with its group
        for each of N minibatches
            one optimizer update; the ratio is π_θ / π_old, π_old the policy that sampled, the same for all N

Everything random is a function of (seed, rollout), and the data position is the rollout's number times the prompts of a rollout. So a
run that is killed anywhere and started again continues from its last checkpoint as if nothing had happened, bit by bit.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from gspo import advantages, build, presets
from gspo.checkpoint import Checkpointer, open_workdir
from gspo.cli import StopSignal
from gspo.data import batches
from gspo.evaluate import make_evaluator
from gspo.learner import make_scorer, make_train_step, minibatch
from gspo.metrics import MetricsWriter, Progress, Timer
from gspo.model.distribution import Sampling
from gspo.types import Batch, Rollout, UserError, completion_mask

ROLLOUT_STREAM = 1  # of the run's random keys
PHASES = ("rollout", "reward", "old_logps", "update")  # what a rollout costs, evaluation and checkpoints aside
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5}  # largest |log-ratio| of a token between two passes of the same weights


def train(config: ConfigDict, workdir: str, *, allow_changed_config: bool = False, title: str = "RL") -> dict[str, Any]:
    """Runs, or resumes, one experiment in workdir. Returns the last line of its metrics.

    Raises UserError for mistakes in the config, and when the loss is NaN or sampler and learner disagree.
    """
    # ------------------------------------------------------------------ config
    check(config)
    objective, settings = build.objective(config)
    sampling = build.sampling(config)
    rows = config.num_prompts * config.num_generations
    updates = config.updates_per_rollout
    micro = build.micro_batch_size(config, rows // updates, "a minibatch")
    advantage_fn = advantages.ADVANTAGES[config.scale_rewards]
    replay = config.router_replay.mode != "disabled"

    # ------------------------------------------------------------------ mesh, data, model
    mesh = build.mesh(config)
    build.check_rows(mesh, num_prompts=config.num_prompts, minibatch_rows=micro or rows // updates)
    tokenizer = build.tokenizer(config)
    source = build.prompt_source(config, config.task.train_split, tokenizer)
    rewards = build.reward_functions(config, source)
    model = build.model(config, tokenizer)
    if replay and not model.spec.num_experts:
        raise UserError(f"router_replay.mode={config.router_replay.mode}: a dense model has no routes; set it to 'disabled'")
    optimizer, learning_rate = build.optimizer(config, total_steps=config.num_rollouts * updates)
    init, abstract = build.state_on_mesh(mesh, model, optimizer, with_ref="ref_logp_BC" in objective.needs)

    # ------------------------------------------------------------------ steps
    width = config.max_completion_length
    sampler = build.sampler(config, model, tokenizer, sampling, config.num_generations)
    train_step = make_train_step(
        model, optimizer, objective, sampling=sampling, micro_batch_size=micro, chunk=config.logp_chunk, replay=replay
    )
    scorer = make_scorer(
        model, completion_width=width, sampling=sampling, chunk=config.logp_chunk, micro_batch_size=micro or rows // updates
    )
    same_draw = (Sampling(config.eval.temperature), config.eval.num_generations_eval) == (sampling, config.num_generations)
    evaluate = make_evaluator(config, mesh, model, tokenizer, sampler=sampler if same_draw else None)

    # ------------------------------------------------------------------ state
    open_workdir(workdir, config.to_dict(), allow_changed_config=allow_changed_config)
    checkpointer = Checkpointer(
        workdir, keep_last=config.checkpoint.keep_last, keep_best=config.checkpoint.keep_best, best_metric="eval/pass@1"
    )
    writer = MetricsWriter(workdir, tensorboard=config.log.tensorboard, wandb=config.log.wandb, config=config.to_dict())
    restored = checkpointer.restore(abstract)
    if restored is None:
        first, state = 0, build.initial_state(config, init, abstract)
        writer.truncate(None)
    else:
        first, state, meta = restored
        writer.truncate(meta["offsets"])
    run_key = jax.random.fold_in(jax.random.key(config.seed), ROLLOUT_STREAM)
    progress = Progress(config.num_rollouts, start=first, title=title)
    progress.note(build.describe(model, abstract))
    progress.note(
        f"{updates} updates per rollout of {config.num_prompts} x {config.num_generations} completions; ratio of the "
        f"{settings['importance_sampling_level']}, surrogate {settings['surrogate']}, clip range "
        f"[1 - {settings['epsilon']:g}, 1 + {settings['epsilon_high']:g}], {settings['loss_agg_mode']}"
    )
    for warning in presets.warnings_of(settings, updates_per_rollout=updates):
        progress.note(f"warning: {warning}")
    if restored is not None:
        progress.note(f"resumed at rollout {first}")

    # ------------------------------------------------------------------ loop
    timer = Timer()
    with StopSignal() as stop, progress, checkpointer, writer:
        for index in range(first, config.num_rollouts + 1):
            last = index == config.num_rollouts
            line: dict[str, Any] = {}
            if last or (config.eval.every and index % config.eval.every == 0):
                with timer("eval"):
                    line, _ = evaluate(state.params)
            due = config.checkpoint.every and index % config.checkpoint.every == 0
            if index > first and (last or stop.requested or due):
                with timer("checkpoint"):
                    checkpointer.save(index, state, {"offsets": writer.offset()}, line)
            if last:
                writer.write(index, line)
                progress.update(index, line)
                break
            if stop.requested:
                checkpointer.wait()
                raise stop.leave(f"saved rollout {index} in {workdir}; start the same command again to go on")

            with timer("rollout"):
                prompts = source.batch(index * config.num_prompts, config.num_prompts)
                prompt_rows = build.put_rows(mesh, prompts.tokens_QP, prompts.lengths_Q)
                rollout = sampler(state.params, *prompt_rows, jax.random.fold_in(run_key, index))
                tokens_BT, lengths_B, truncated_B = jax.device_get(
                    (rollout.tokens_BT, rollout.completion_lengths_B, rollout.truncated_B)
                )
            with timer("reward"):
                texts = batches.completion_texts(tokenizer, tokens_BT, prompts.tokens_QP.shape[1], lengths_B)
                examples = [example for example in prompts.examples for _ in range(config.num_generations)]
                rewards_B, parts_BR = batches.score_completions(
                    texts, examples, list(rewards.values()), config.reward_weights
                )
                advantages_B = advantage_fn(jnp.asarray(rewards_B), config.num_generations)
            with timer("old_logps"):
                batch = make_batch(rollout, advantages_B, width)
                if config.old_logps == "learner" or config.router_replay.mode == "R2":
                    scores = scorer(state.params, batch.tokens_BT, batch.prompt_lengths_B)
                    batch = batch.replace(routes_LBTX=scores.routes_LBTX)
                    if config.old_logps == "learner":
                        batch = batch.replace(old_logp_BC=scores.logp_BC)
                if state.ref_params is not None:
                    ref = scorer(state.ref_params, batch.tokens_BT, batch.prompt_lengths_B)
                    batch = batch.replace(ref_logp_BC=ref.logp_BC)
                jax.block_until_ready(batch)
            with timer("update"):
                steps = []
                for j in range(updates):
                    state, metrics = train_step(state, minibatch(batch, j, updates))
                    steps.append(metrics)
                steps = jax.device_get(steps)
            guard(config, index, steps, checkpointer)

            line |= rollout_metrics(rewards_B, parts_BR, list(rewards), lengths_B, truncated_B, config.num_generations)
            line |= update_metrics(steps)
            line["learning_rate"] = float(learning_rate(index * updates))
            writer.write(index, line)
            timings = timer.take()
            timings["tokens_per_second"] = int(lengths_B.sum()) / sum(timings[phase] for phase in PHASES)
            writer.write_timings(index, timings)
            if config.log.samples_every and index % config.log.samples_every == 0:
                writer.write_samples(index, [
                    {"prompt": example.prompt, "completion": text, "answer": example.answer, "reward": float(reward)}
                    for example, text, reward in list(zip(examples, texts, rewards_B, strict=True))[: config.log.num_samples]
                ])  # fmt: skip
            progress.update(index, line | timings)
    return line


def check(config: ConfigDict) -> None:
    """Mistakes that no single part can see."""
    build.positive(config, "num_rollouts", "num_prompts", "num_generations", "updates_per_rollout", "logp_chunk")
    if config.num_generations < 2:
        raise UserError(f"num_generations={config.num_generations}: group advantages compare completions of a prompt; use 2 or more")
    rows = config.num_prompts * config.num_generations
    if rows % config.updates_per_rollout:
        raise UserError(
            f"updates_per_rollout={config.updates_per_rollout}: must divide the {rows} rows of a rollout "
            f"(num_prompts={config.num_prompts} x num_generations={config.num_generations})"
        )
    for field, value, known in (
        ("scale_rewards", config.scale_rewards, tuple(advantages.ADVANTAGES)),
        ("old_logps", config.old_logps, ("sampler", "learner")),
        ("router_replay.mode", config.router_replay.mode, ("disabled", "R2", "R3")),
    ):
        if value not in known:
            raise UserError(f"{field}={value!r}: choose one of {', '.join(known)}")


def make_batch(rollout: Rollout, advantages_B: jax.Array, width: int) -> Batch:
    """The rollout as the learner sees it: the sampler's log-probs are the old policy's, its routes those to compare with or replay."""
    mask_BC = completion_mask(rollout.completion_lengths_B, width)
    return Batch(
        tokens_BT=rollout.tokens_BT,
        prompt_lengths_B=rollout.prompt_lengths_B,
        completion_lengths_B=rollout.completion_lengths_B,
        loss_mask_BC=mask_BC,
        advantages_BC=jnp.where(mask_BC, advantages_B[:, None], 0.0),
        old_logp_BC=rollout.logp_BC,
        routes_LBTX=rollout.routes_LBTX,
    )


def guard(config: ConfigDict, index: int, steps: list[dict], checkpointer: Checkpointer) -> None:
    """Stops the run where going on would waste it: NaN, or an old policy that is not the one that sampled (decision 6 of the design:
    before the first update of a rollout, ratio and 1 may differ by rounding only).
    """
    saved = f"; the last good checkpoint is rollout {max(checkpointer.steps())}" if checkpointer.steps() else ""
    for j, metrics in enumerate(steps):
        if not (np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])):
            raise UserError(f"rollout {index}, update {j}: loss or gradient is not finite{saved}; lower optimizer.learning_rate")
    tolerance = config.check_tolerance or TOLERANCE[config.model.dtype]
    gap = float(steps[0]["log_ratio/abs_max"])
    if gap > tolerance:
        raise UserError(
            f"rollout {index}: before the first update sampler and learner differ by {gap:.2e} in a token's log-prob, more than "
            f"check_tolerance={tolerance:g}; the old log-probs are not those of this policy (stale weights, another temperature, a "
            f"wrong mask){saved}"
        )


def rollout_metrics(rewards_B, parts_BR, names, lengths_B, truncated_B, num_generations: int) -> dict[str, float]:
    """Host-side metrics of one rollout; lengths in tokens."""
    spread_Q = rewards_B.reshape(-1, num_generations).std(axis=1)
    metrics = {
        "reward/mean": float(rewards_B.mean()),
        "reward/std": float(rewards_B.std()),
        "frac_reward_zero_std": float((spread_Q == 0).mean()),
        "completions/mean_length": float(lengths_B.mean()),
        "completions/max_length": int(lengths_B.max()),
        "completions/clipped_ratio": float(truncated_B.mean()),
    }
    return metrics | {f"rewards/{name}": float(parts_BR[:, r].mean()) for r, name in enumerate(names)}


def update_metrics(steps: list[dict[str, Any]]) -> dict[str, float]:
    """One value per metric from the N updates of a rollout: the mean, but the extreme where the name says so.

    Routing drift is a distance from the policy that sampled: after one update (`..._per_update`, from the second minibatch) and after
    N - 1 (the last minibatch).
    """
    line = {}
    for name in steps[0]:
        values = np.array([float(metrics[name]) for metrics in steps])
        reduce = {"max": np.max, "min": np.min}.get(name.rsplit("/")[-1].rsplit("_")[-1], np.mean)
        line[name] = float(reduce(values))
        if name.startswith("routing/") and name.endswith("_changed"):
            line[name] = float(values[-1])
            if len(values) > 1:
                line[f"{name}_per_update"] = float(values[1])
    line["grad_norm/max"] = float(max(metrics["grad_norm"] for metrics in steps))
    line["log_ratio/first_abs_max"] = float(steps[0]["log_ratio/abs_max"])
    return line
