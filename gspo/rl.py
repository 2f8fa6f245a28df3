"""Reinforcement learning: rollout -> rewards -> advantages -> several updates against a fixed old policy. Start reading
here.

    for each rollout
        sample G completions per prompt from the policy, with their log-probs and routes
        score them with verifiable rewards; compare each with its group            (gspo.collect)
        for each of N minibatches, once or in several passes over the rollout
            one optimizer update; the ratio is π_θ / π_old, π_old the policy that sampled, the same for all of them

Everything random is a function of (seed, rollout), and the data position is one integer. So a run that is killed
anywhere and started again continues from its last checkpoint as if nothing had happened, bit by bit.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from gspo import plans
from gspo.collect import Collector
from gspo.data.scoring import RewardsFailed
from gspo.data.tokenizer import Tokenizer, make_tokenizer
from gspo.evaluate import Writer, describe_scorer, make_evaluator
from gspo.generate import check_splits, prompt_source
from gspo.held import ReferencePlan, describe_trees, trees_of
from gspo.learning.agreement import Gap, complaint
from gspo.learning.drift import DISTANCES
from gspo.learning.learner import make_ref_sync
from gspo.learning.state import copy_tree
from gspo.masked import Metrics, added, values
from gspo.objectives import clip_range, warnings_of
from gspo.parallel import distributed
from gspo.record import Recorder, Recording
from gspo.resume import open_run, tokenizer_of_run
from gspo.run.checkpoint import Checkpointer
from gspo.run.cli import StopSignal
from gspo.run.profile import Profiler
from gspo.run.progress import Progress, Timer, is_due
from gspo.steps import Steps, describe, describe_adapters, describe_layout, initial_state, make_layout, make_steps
from gspo.types import Batch, Diverged, TrainState, UserError

ROLLOUT_STREAM = 1  # of the run's random keys
SHUFFLE_STREAM = 3  # of the passes over a rollout after its first
PHASES = ("rollout", "reward", "old_logps", "update")  # what a rollout costs, evaluation and checkpoints aside


def train(plan: plans.RLPlan, workdir: str, *, allow_changed_config: bool = False, title: str = "RL") -> dict[str, Any]:
    """Runs, or resumes, one experiment in workdir. Returns the last line of its metrics.

    Raises UserError for mistakes in the plan, and when the loss is NaN or sampler and learner disagree.
    """
    # ------------------------------------------------------------------ parts and state
    tokenizer = tokenizer_of_run(plan)
    run = prepare(plan, tokenizer)
    steps, spec = run.steps, run.steps.model.spec
    opened = open_run(plan, workdir, steps.start, spec, tokenizer, allow_changed_config=allow_changed_config)
    checkpointer, writer, first, state = opened.checkpointer, opened.writer, opened.first, opened.state
    cursor = opened.meta.get("cursor", 0)
    run_key = jax.random.fold_in(jax.random.key(plan.seed), ROLLOUT_STREAM)
    recorder = Recorder(plan, steps, workdir, tokenizer, first)

    def save(index: int, line: dict[str, Any]) -> None:
        checkpointer.save(index, state.saved, {"cursor": cursor, "offsets": writer.offset()}, line)

    progress = Progress(plan.num_rollouts, start=first, title=title)
    for note in run.notes + [f"resumed at rollout {first}"] * opened.resumed:
        progress.note(note)

    # ------------------------------------------------------------------ loop
    timer = Timer()
    profiler = Profiler(workdir, plan.log.profile)
    with StopSignal() as stop, progress, opened.held, profiler:
        for index in range(first, plan.num_rollouts + 1):
            last = index == plan.num_rollouts
            profiler.at(index)
            line: dict[str, Any] = {}
            if last or is_due(index, plan.evaluation.every):
                with timer("eval"), saved_where_rewards_fail(index, checkpointer, save):
                    line, _ = run.evaluate(state.policy)
            stopping = distributed.any_process(stop.requested)
            if stopping or (index > first and (last or is_due(index, plan.checkpoint.every))):
                with timer("checkpoint"):
                    save(index, line)
            if last:
                writer.write(index, line)
                progress.update(index, line)
                break
            if stopping:
                checkpointer.wait()
                raise stop.leave(f"saved rollout {index} in {workdir}; start the same command again to go on")

            with saved_where_rewards_fail(index, checkpointer, save, line):
                experience = run.collector(state, cursor, jax.random.fold_in(run_key, index), timer)
            cursor = experience.next_cursor
            recording = recorder.start(index, experience)
            with timer("update"):
                keys, warming = shuffle_keys(plan, index), index < plan.critic_warmup
                state, done = update(steps, state, experience.batch, keys, recording, critic_only=warming)
            guard(plan, index, done, experience.sampler_gap, checkpointer)
            if recording:
                with timer("record"):
                    note = recording.finish(state.policy)
                if index - first < plan.log.tokens_every:  # the first of this process
                    progress.note(note)
            state = run.follow(state, index)

            rate = 0.0 if warming else float(steps.learning_rate((index - plan.critic_warmup) * plan.updates))
            line |= experience.metrics | update_metrics(done) | {"learning_rate": rate}
            writer.write(index, line)
            timings = timer.take()
            timings["tokens_per_second"] = line["num_tokens"] / sum(timings[phase] for phase in PHASES)
            writer.write_timings(index, timings)
            if is_due(index, plan.log.samples_every):
                writer.write_samples(index, experience.samples)
            sample = experience.samples[0] if experience.samples else None
            text = sample and f"{sample['prompt']}{sample['completion']}  reward {sample['reward']:g}"
            progress.update(index, line | timings, text)
    return line


def rehearse(plan: plans.RLPlan) -> None:
    """One rollout with its updates, and an evaluation, of which nothing is kept but compiled programs
    (`gspo.run.machine.keep_programs`): a run of the same plan finds them, whatever weights it begins with. Raises
    UserError as `train` does."""
    tokenizer = tokenizer_of_run(plan)
    run = prepare(plan, tokenizer)
    state = initial_state(plan, run.steps.start)
    run.evaluate(state.policy)
    experience = run.collector(state, 0, jax.random.key(0), Timer())
    with tempfile.TemporaryDirectory() as nowhere:
        recording = Recorder(plan, run.steps, nowhere, tokenizer, 0).start(0, experience)
        state, _ = update(run.steps, state, experience.batch, shuffle_keys(plan, 0)[:1], recording)
        if recording:
            recording.finish(state.policy)


def update(
    steps: Steps,
    state: TrainState,
    batch: Batch,
    further: Sequence[jax.Array] = (),
    recording: Recording | None = None,
    *,
    critic_only: bool = False,
) -> tuple[TrainState, list[Metrics]]:
    """N optimizer updates, one for each minibatch of the rollout, all against the old policy that is in the batch; and
    N more for each of the keys `further`, which shuffle the rows anew. Returns the new state and the metrics of each
    update. recording: is shown what each of the first N starts from. critic_only: the policy's metrics are taken, and
    it stays as it is.
    """
    if state.stale_params:  # a sampler that lags behind draws from the oldest of these
        state = state.replace(stale_params=(*state.stale_params[1:], copy_tree(state.params)))
    done = []
    for key in (None, *further):
        for minibatch in steps.minibatches(batch if key is None else steps.reshuffled(batch, key)):
            if recording and key is None:
                recording(state.policy, minibatch)
            if critic_only:
                metrics = steps.measure(state, minibatch)
            else:
                state, metrics = steps.train_step(state, minibatch)  # log-probs -> objective -> gradient -> optimizer
            if steps.critic_step:
                critic, more = steps.critic_step(state.critic, minibatch)
                state, metrics = state.replace(critic=critic), metrics | more
            done.append(metrics)
    return state, jax.device_get(done)


def shuffle_keys(plan: plans.RLPlan, index: int) -> list[jax.Array]:
    """The keys of the passes over rollout `index` after its first: functions of (seed, rollout, pass)."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(plan.seed), SHUFFLE_STREAM), index)
    return [jax.random.fold_in(key, iteration) for iteration in range(1, plan.num_iterations)]


@contextlib.contextmanager
def saved_where_rewards_fail(
    index: int, checkpointer: Checkpointer, save: Callable[[int, dict], None], line: dict[str, Any] | None = None
) -> Iterator[None]:
    """A run whose rewards fail too often is saved at this rollout before it stops: the policy is none the worse for
    them."""
    try:
        yield
    except RewardsFailed as error:
        save(index, line or {})
        raise UserError(f"rollout {index}: {error}{checkpointer.last_good()}") from None


# ---------------------------------------------------------------------------- the parts of a run


class Run(NamedTuple):
    """The parts of one run, made from its plan."""

    steps: Steps
    collector: Collector
    evaluate: Any  # params -> (metrics, samples)
    follow: Any  # (state, rollout) -> state whose reference has followed the policy, at the rollouts where it does
    notes: list[str]  # what the log says first


def prepare(plan: plans.RLPlan, tokenizer: Tokenizer | None = None) -> Run:
    """Plan -> parts. tokenizer: that of the run, where it is made already. Raises UserError for every mistake that can
    be seen before the first rollout."""
    layout, tokenizer = make_layout(plan.mesh), tokenizer or make_tokenizer(plan.data.tokenizer)
    steps = make_steps(plan, layout, tokenizer)
    split_notes = check_splits(plan.data)
    source = prompt_source(plan.data, plan.data.train_split, tokenizer)
    collector = Collector(plan, steps, tokenizer, source)
    evaluate = make_evaluator(plan, steps.model, tokenizer, _shared_writer(plan, steps))
    notes = [describe(steps.model, steps.abstract), _describe_updates(plan), *steps.notes, *split_notes]
    held = trees_of(steps.abstract) | {name: model.params for name, model in collector.models.items()}
    notes[1:1] = describe_trees(held)
    notes += describe_scorer(plan, source.task, [*plan.experience.reward_functions])
    if plan.lora:
        notes.insert(1, describe_adapters(plan.lora, steps.abstract))
    notes += [f"warning: {text}" for text in _warnings(plan)]
    if layout.several:
        notes.insert(1, describe_layout(plan.mesh, layout))
    if source.num_dropped:
        limit = plan.data.max_prompt_length
        notes.append(f"{source.num_dropped} prompts longer than max_prompt_length={limit} tokens were dropped")
    return Run(steps, collector, evaluate, _make_follow(plan.reference), notes)


def _warnings(plan: plans.RLPlan) -> list[str]:
    """One line for each setting that is allowed and probably not meant."""
    found = warnings_of(plan.objective, updates_per_rollout=plan.updates)
    if plan.preset == "ppo" and not plan.critic:
        found.append(
            "objective.preset 'ppo' without a critic takes its advantages from the group; set critic.enable=true"
        )
    per_sequence = plan.objective["importance_sampling_level"] in ("sequence", "sequence_token")
    clips = clip_range(plan.objective)
    narrow = clips and min(plan.objective["epsilon_high"], plan.objective["epsilon"]) < 1e-2
    rounds = plan.model.fields["dtype"] == "bfloat16" and plan.experience.old_logps == "sampler"
    if per_sequence and narrow and rounds:
        found.append(
            "old_logps 'sampler' with model.dtype 'bfloat16': sampler and learner round differently, by more than the "
            f"clip range {clips} of a sequence; set old_logps='learner'"
        )
    return found


def _shared_writer(plan: plans.RLPlan, steps: Steps) -> Writer | None:
    """The sampler of the rollouts, where evaluation draws in the same way: one compilation for both."""
    shared = plan.evaluation.drawn == plan.rollout.drawn
    shared = shared and not (plan.rollout.router_noise or plan.rollout.expert_swap)
    return Writer(steps.rollout_params, steps.sampler) if shared else None


def _make_follow(plan: ReferencePlan):
    if not plan.sync_steps:
        return lambda state, index: state
    sync, storage = make_ref_sync(plan.mixup_alpha), plan.storage

    def follow(state: TrainState, index: int) -> TrainState:
        if (index + 1) % plan.sync_steps:
            return state
        return state.replace(ref_params=storage.kept(sync(state.params, storage.fetched(state.ref_params))))

    return follow


def _describe_updates(plan: plans.RLPlan) -> str:
    """One line for the log: what one rollout is used for."""
    chosen = plan.objective
    passes = f" in {plan.num_iterations} passes" if plan.num_iterations > 1 else ""
    clips = clip_range(chosen) and f", clip range {clip_range(chosen)}"
    return (
        f"{plan.updates} updates per rollout{passes} of {plan.rollout.num_prompts} x "
        f"{plan.rollout.num_generations} completions; ratio of the {chosen['importance_sampling_level']}, surrogate "
        f"{chosen['surrogate']}{clips}, {chosen['loss_agg_mode']}"
    )


# ---------------------------------------------------------------------------- what is watched, what is written


def guard(
    plan: plans.RLPlan, index: int, steps: list[Metrics], sampler_gap: Gap | None, checkpointer: Checkpointer
) -> None:
    """Stops the run where going on would waste it: NaN, of the policy or the critic, or an old policy that is not the
    one that sampled. The old log-probs are compared with the policy before the first update, and, where it is free, the
    sampler's with the learner's over all rows: a learner compared with itself proves nothing. See
    `gspo.learning.agreement`.
    """
    for j, metrics in enumerate(steps):
        # The critic first: where both are NaN, its values have made the advantages of this rollout.
        parts = [("critic/", " of the critic", "critic")] if "critic/loss" in metrics else []
        for prefix, whose, section in [*parts, ("", "", "optimizer")]:
            if not all(np.isfinite(metrics[prefix + name].value) for name in ("loss", "grad_norm")):
                raise Diverged(
                    f"rollout {index}, update {j}: loss or gradient{whose} is not finite{checkpointer.last_good()}; "
                    f"lower {section}.learning_rate"
                )
    first = Gap(float(steps[0]["log_ratio/abs_p999"].value), float(steps[0]["approx_kl/k3"].value))
    for gap in (first, sampler_gap):
        wrong = gap and complaint(gap, plan.model.fields["dtype"], plan.check_tolerance)
        if wrong:
            raise UserError(f"rollout {index}: {wrong}{checkpointer.last_good()}")


def update_metrics(steps: list[Metrics]) -> dict[str, Any]:
    """One value per metric from the N updates of a rollout, added up as each of them says (`gspo.masked`); distances
    from the policy that sampled after one update as well; and two that belong to the rollout alone."""
    line = values(added(steps))
    if len(steps) > 1:
        after_one = values({name: metric for name, metric in steps[1].items() if name in DISTANCES})
        line |= {f"{name}_per_update": value for name, value in after_one.items()}
    line["grad_norm/max"] = max(float(metrics["grad_norm"].value) for metrics in steps)
    line["log_ratio/first_abs_max"] = float(steps[0]["log_ratio/abs_max"].value)
    return line
