"""Reinforcement learning: rollout -> rewards -> advantages -> several updates against a fixed old policy. Start reading
here.

    for each rollout
        sample G completions per prompt from the policy, with their log-probs and routes
        score them with verifiable rewards; compare each with its group            (gspo.collect)
        for each of N minibatches
            one optimizer update; the ratio is π_θ / π_old, π_old the policy that sampled, the same for all N

Everything random is a function of (seed, rollout), and the data position is one integer. So a run that is killed
anywhere and started again continues from its last checkpoint as if nothing had happened, bit by bit.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from gspo import build, collect
from gspo.collect import Collector
from gspo.evaluate import make_evaluator
from gspo.learning.learner import make_ref_sync
from gspo.model.distribution import Sampling
from gspo.objectives import presets
from gspo.parallel import distributed
from gspo.run.checkpoint import Checkpointer
from gspo.run.cli import StopSignal
from gspo.run.progress import Progress, Timer
from gspo.run.workdir import open_workdir
from gspo.run.writers import MetricsWriter
from gspo.steps import Steps, make_steps
from gspo.types import UserError

ROLLOUT_STREAM = 1  # of the run's random keys
PHASES = ("rollout", "reward", "old_logps", "update")  # what a rollout costs, evaluation and checkpoints aside
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5}  # largest |log-ratio| of a token between two passes of the same weights


class Run(NamedTuple):
    """The parts of one run, made from its config."""

    steps: Steps
    collector: Collector
    evaluate: Any  # params -> (metrics, samples)
    notes: list[str]  # what the log says first


def prepare(config: ConfigDict) -> Run:
    """Config -> parts. Raises UserError for every mistake that can be seen before the first rollout."""
    check(config)
    layout, tokenizer = build.layout(config), build.tokenizer(config)
    steps = make_steps(config, layout, tokenizer)
    source = build.prompt_source(config, config.task.train_split, tokenizer)
    same_draw = (Sampling(config.eval.temperature), config.eval.num_generations_eval) == (
        steps.sampling,
        config.num_generations,
    )
    same_draw = same_draw and not (config.mismatch.router_noise or config.mismatch.expert_swap)
    evaluate = make_evaluator(
        config,
        layout,
        steps.model,
        tokenizer,
        sampler=steps.sampler if same_draw else None,
        rollout_params=steps.rollout_params,
    )
    collector = Collector(config, steps, tokenizer, source)

    settings, updates = steps.settings, config.updates_per_rollout
    notes = [
        build.describe(steps.model, steps.abstract),
        f"{updates} updates per rollout of {config.num_prompts} x {config.num_generations} completions; ratio of the "
        f"{settings['importance_sampling_level']}, surrogate {settings['surrogate']}, clip range "
        f"[1 - {settings['epsilon']:g}, 1 + {settings['epsilon_high']:g}], {settings['loss_agg_mode']}",
        *(f"warning: {text}" for text in presets.warnings_of(settings, updates_per_rollout=updates)),
    ]
    if layout.several:
        notes.insert(1, build.describe_layout(config, layout))
    if config.objective.preset == "ppo" and not config.critic.enable:
        notes.append(
            "warning: objective.preset 'ppo' without a critic takes its advantages from the group; set "
            "critic.enable=true"
        )
    if source.num_dropped:
        notes.append(
            f"{source.num_dropped} prompts longer than max_prompt_length={config.max_prompt_length} tokens were dropped"
        )
    return Run(steps, collector, evaluate, notes)


def train(config: ConfigDict, workdir: str, *, allow_changed_config: bool = False, title: str = "RL") -> dict[str, Any]:
    """Runs, or resumes, one experiment in workdir. Returns the last line of its metrics.

    Raises UserError for mistakes in the config, and when the loss is NaN or sampler and learner disagree.
    """
    # ------------------------------------------------------------------ parts
    run = prepare(config)
    steps, updates = run.steps, config.updates_per_rollout
    sync_reference = make_ref_sync(config.ref_model_mixup_alpha) if config.sync_ref_model else None

    # ------------------------------------------------------------------ state
    open_workdir(workdir, config.to_dict(), allow_changed_config=allow_changed_config, check_only=True)
    checkpointer = Checkpointer(
        workdir, keep_last=config.checkpoint.keep_last, keep_best=config.checkpoint.keep_best, best_metric="eval/pass@1"
    )
    writer = MetricsWriter(workdir, tensorboard=config.log.tensorboard, wandb=config.log.wandb, config=config.to_dict())
    restored = checkpointer.restore(steps.abstract)
    if restored is None:
        first, state, meta = 0, build.initial_state(config, steps.init, steps.abstract), {"cursor": 0, "offsets": None}
    else:
        first, state, meta = restored
        run.notes.append(f"resumed at rollout {first}")
    open_workdir(
        workdir, config.to_dict(), allow_changed_config=allow_changed_config
    )  # nothing failed: from now on it is this run's
    writer.truncate(meta["offsets"])
    cursor = meta["cursor"]
    run_key = jax.random.fold_in(jax.random.key(config.seed), ROLLOUT_STREAM)
    progress = Progress(config.num_rollouts, start=first, title=title)
    for note in run.notes:
        progress.note(note)

    # ------------------------------------------------------------------ loop
    timer = Timer()
    with StopSignal() as stop, progress, checkpointer, writer:
        for index in range(first, config.num_rollouts + 1):
            last = index == config.num_rollouts
            line: dict[str, Any] = {}
            if last or (config.eval.every and index % config.eval.every == 0):
                with timer("eval"):
                    line, _ = run.evaluate(state.params)
            due = config.checkpoint.every and index % config.checkpoint.every == 0
            stopping = distributed.any_process(stop.requested)
            if stopping or (index > first and (last or due)):
                with timer("checkpoint"):
                    checkpointer.save(index, state, {"cursor": cursor, "offsets": writer.offset()}, line)
            if last:
                writer.write(index, line)
                progress.update(index, line)
                break
            if stopping:
                checkpointer.wait()
                raise stop.leave(f"saved rollout {index} in {workdir}; start the same command again to go on")

            experience = run.collector(state, cursor, jax.random.fold_in(run_key, index), timer)
            cursor = experience.next_cursor
            with timer("update"):
                if state.stale_params:  # a sampler that lags behind draws from the oldest of these
                    state = state.replace(stale_params=(*state.stale_params[1:], build.copy_tree(state.params)))
                done = []
                for part in steps.minibatches(experience.batch):
                    state, metrics = steps.train_step(state, part)
                    if steps.critic_step:
                        critic, more = steps.critic_step(state.critic, part)
                        state, metrics = state.replace(critic=critic), metrics | more
                    done.append(metrics)
                done = jax.device_get(done)
            guard(config, index, done, checkpointer)
            if sync_reference and (index + 1) % config.ref_model_sync_steps == 0:
                state = state.replace(ref_params=sync_reference(state.params, state.ref_params))

            line |= (
                experience.metrics
                | update_metrics(done)
                | {"learning_rate": float(steps.learning_rate(index * updates))}
            )
            writer.write(index, line)
            timings = timer.take()
            timings["tokens_per_second"] = line["num_tokens"] / sum(timings[phase] for phase in PHASES)
            writer.write_timings(index, timings)
            if config.log.samples_every and index % config.log.samples_every == 0:
                writer.write_samples(index, experience.samples)
            sample = experience.samples[0] if experience.samples else None
            progress.update(
                index,
                line | timings,
                sample and f"{sample['prompt']}{sample['completion']}  reward {sample['reward']:g}",
            )
    return line


def check(config: ConfigDict) -> None:
    """Mistakes in the fields of the loop; `collect.check` has those of the experience."""
    build.positive(config, "num_rollouts", "num_prompts", "num_generations", "updates_per_rollout", "logp_chunk")
    build.positive(config, "max_prompt_length", "max_completion_length")
    collect.check(config)
    rows = config.num_prompts * config.num_generations
    if rows % config.updates_per_rollout:
        raise UserError(
            f"updates_per_rollout={config.updates_per_rollout}: must divide the {rows} rows of a rollout "
            f"(num_prompts={config.num_prompts} x num_generations={config.num_generations})"
        )


def guard(config: ConfigDict, index: int, steps: list[dict], checkpointer: Checkpointer) -> None:
    """Stops the run where going on would waste it: NaN, or an old policy that is not the one that sampled. Before the
    first update of a rollout, ratio and 1 may differ by rounding only.
    """
    for j, metrics in enumerate(steps):
        if not (np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])):
            raise UserError(
                f"rollout {index}, update {j}: loss or gradient is not finite{checkpointer.last_good()}; lower "
                "optimizer.learning_rate"
            )
    tolerance = config.check_tolerance or TOLERANCE[config.model.dtype]
    gap = float(steps[0]["log_ratio/abs_max"])
    if gap > tolerance:
        raise UserError(
            f"rollout {index}: before the first update sampler and learner differ by {gap:.2e} in a token's "
            "log-prob, more than "
            f"check_tolerance={tolerance:g}; the old log-probs are not those of this policy (stale weights, another "
            "temperature, a "
            f"wrong mask){checkpointer.last_good()}"
        )


def update_metrics(steps: list[dict[str, Any]]) -> dict[str, float]:
    """One value per metric from the N updates of a rollout: the mean, but the extreme where the name says so.

    Routing drift is a distance from the policy that sampled: after one update (`..._per_update`, from the second
    minibatch) and after N - 1 (the last minibatch).
    """
    line = {}
    for name in steps[0]:
        if name.endswith("_by_layer"):
            line[name] = np.asarray(steps[-1][name]).tolist()
            continue
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
