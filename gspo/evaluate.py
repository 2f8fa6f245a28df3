"""Evaluation on held-out prompts: pass@k for every k up to the number of samples, their mean score, lengths."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from gspo import plans
from gspo.data.rewards import REWARDS
from gspo.data.scoring import make_scorer
from gspo.data.tasks import Task
from gspo.data.tokenizer import Tokenizer
from gspo.generate import Generator, judge, prompt_source, sample_line
from gspo.model.distribution import Sampling
from gspo.model.transformer import Transformer
from gspo.run.identity import dated_tokenizer, identity, restore_known
from gspo.steps import check_rows, make_layout, make_model, make_rollout_layout, make_rollout_params, sampler_of
from gspo.types import Params, Rollout

SOLVED = 1.0 - 1e-6  # a completion is correct when the reward of evaluation is 1
EVAL_STREAM = 2  # of the run's random keys; the loops use 1, initialisation 0


class Writer(NamedTuple):
    """What writes the completions that are judged: the map from the policy's parameters to those that the jitted
    sampler reads, and the sampler."""

    rollout_params: Callable[[Params], Params]
    sampler: Callable[..., Rollout]


def make_writer(
    plan: plans.PolicyPlan, model: Transformer, tokenizer: Tokenizer, drawn: tuple[Sampling, int, int]
) -> Writer:
    """A sampler beside that of training: without an injected mismatch. drawn: as `plans.RolloutPlan.drawn`."""
    sampled = model.clone(layout=make_rollout_layout(plan.mesh, model.layout))
    sampler = sampler_of(sampled, plan.data, tokenizer, *drawn)
    return Writer(make_rollout_params(plan.mesh, model), sampler)


def make_evaluator(
    plan: plans.RunPlan, model: Transformer, tokenizer: Tokenizer, writer: Writer | None = None
) -> Callable[[Params], tuple[dict[str, float], list[dict]]]:
    """Returns `evaluate(params) -> (metrics, samples)` over eval.num_prompts prompts of the evaluation split.

    The prompts and the noise are the same at every call, so that two evaluations differ by the parameters alone.
    writer: one to share with the caller (and its compilation), where it draws what the plan asks for.

    metrics, over n = eval.num_generations_eval samples of each prompt: eval/pass@k for k = 1 .. n (`pass_at`; for 1 the
    share of all samples that are solved, with its standard error over prompts); eval/avg@n, the mean of their rewards,
    which is pass@1 where a reward is 0 or 1; lengths in tokens, truncated share.
    """
    writer = writer or make_writer(plan, model, tokenizer, plan.evaluation.drawn)
    source = prompt_source(plan.data, plan.data.eval_split, tokenizer)
    scorer = make_scorer([plan.evaluation.reward or "task"], source.task, judging=plan.judging, field="eval.reward")
    stop, n = plan.data.stop, plan.evaluation.num_generations_eval
    count = min(plan.evaluation.num_prompts, len(source))
    # Equal calls, one compile, each of as many prompts as the devices can share evenly; what the last has too many is
    # dropped.
    parts = model.layout.parts("rows")
    width = -(-min(count, plan.evaluation.at_a_time) // parts) * parts
    check_rows(model.layout, **{"eval.num_prompts": width})
    generate = Generator(model.layout, source, writer.sampler, n, stop)
    key = jax.random.fold_in(jax.random.key(plan.seed), EVAL_STREAM)

    def evaluate(params: Params) -> tuple[dict[str, float], list[dict]]:
        rewards, lengths, truncated, samples = [], [], [], []
        params = writer.rollout_params(params)
        for start in range(0, count, width):
            kept = min(width, count - start) * n
            completions = generate(params, start, width, jax.random.fold_in(key, start))
            judged = judge(completions, tokenizer, scorer, stop)
            rewards.append(judged.rewards_B[:kept].reshape(-1, n))
            lengths.append(judged.lengths_B[:kept])
            truncated.append(judged.truncated_B[:kept])
            for row, example, text in list(zip(judged.local_B, judged.examples, judged.texts, strict=True))[::n]:
                if row < kept:
                    samples.append(sample_line(example, text, judged.rewards_B[row]))
        rewards_Qn = np.concatenate(rewards)
        solved_Qn = rewards_Qn >= SOLVED
        metrics = {
            "eval/pass@1": float(solved_Qn.mean()),
            "eval/pass@1_stderr": float(solved_Qn.mean(axis=1).std(ddof=1) / np.sqrt(count)) if count > 1 else 0.0,
            **{f"eval/pass@{k}": pass_at(k, solved_Qn.sum(axis=1), n) for k in range(2, n + 1)},
            f"eval/avg@{n}": float(rewards_Qn.mean(dtype=np.float64)),
            "eval/mean_length": float(np.concatenate(lengths).mean()),
            "eval/clipped_ratio": float(np.concatenate(truncated).mean()),
        }
        return metrics, samples

    return evaluate


def pass_at(k: int, solved_Q: np.ndarray, n: int) -> float:
    """pass@k: the chance that at least one of k samples is correct, from c correct ones among n, without bias:

        1 − C(n − c, k) / C(n, k)                mean over prompts

    C(n − c, k) is 0 where n − c < k: some of any k are then correct. "Evaluating Large Language Models Trained on Code"
    (2107.03374) §2.1, eq. 1. solved_Q: c of each prompt, int."""
    missed_Q = [math.comb(n - int(c), k) / math.comb(n, k) for c in solved_Q]
    return float(1 - np.mean(missed_Q))


def describe_scorer(plan: plans.RunPlan, task: Task, trained_on: Sequence[str] = ()) -> list[str]:
    """Lines for the log: by what completions are judged in evaluation, and a warning where the rewards of training
    (trained_on) are others and nobody has said so."""
    own = next((name for name, function in REWARDS.items() if function is task.reward), "its own scorer")
    chosen = plan.evaluation.reward
    found = [f"evaluation counts what {chosen or f'the task, by {own},'} gives 1 as solved"]
    if not chosen and trained_on and not {"task", own} & set(trained_on):
        found.append(
            f"warning: eval.reward: evaluation is by the task's own reward ({own}), training by "
            f"{', '.join(trained_on)}; set eval.reward to choose one of these"
        )
    return found


def evaluate_workdir(plan: plans.RunPlan, workdir: str) -> tuple[int, dict[str, float], list[dict]]:
    """Evaluates the latest good checkpoint of a run, or "runs/x@best", "runs/x@120". Returns (its step, metrics,
    samples)."""
    layout, tokenizer = make_layout(plan.mesh), dated_tokenizer(plan.data.tokenizer, plan.date)
    model = make_model(plan.model, tokenizer, layout)
    step, params = restore_known(workdir, model, layout, identity(model.spec, tokenizer))
    return step, *make_evaluator(plan, model, tokenizer)(params)
