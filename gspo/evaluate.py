"""Evaluation on held-out prompts: pass@1 over k samples, pass@k, lengths."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from gspo import plans
from gspo.data.tokenizer import Tokenizer
from gspo.generate import Generator, judge, prompt_source, sample_line
from gspo.model.transformer import Transformer, abstract_params
from gspo.run.checkpoint import restore_params
from gspo.run.identity import check_identity, dated_tokenizer, identity
from gspo.steps import check_rows, make_layout, make_model, make_rollout_layout, make_rollout_params, sampler_of
from gspo.types import Params, Rollout

SOLVED = 1.0 - 1e-6  # a completion is correct when the task's own reward is 1
EVAL_STREAM = 2  # of the run's random keys; the loops use 1, initialisation 0


class Writer(NamedTuple):
    """What writes the completions that are judged: the map from the policy's parameters to those that the jitted
    sampler reads, and the sampler."""

    rollout_params: Callable[[Params], Params]
    sampler: Callable[..., Rollout]


def make_writer(plan: plans.RunPlan, model: Transformer, tokenizer: Tokenizer) -> Writer:
    """A sampler of its own for evaluation: at eval.temperature, without cuts and without an injected mismatch."""
    sampled = model.clone(layout=make_rollout_layout(plan.mesh, model.layout))
    sampler = sampler_of(sampled, plan.data, tokenizer, *plan.evaluation.drawn)
    return Writer(make_rollout_params(plan.mesh, model), sampler)


def make_evaluator(
    plan: plans.RunPlan, model: Transformer, tokenizer: Tokenizer, writer: Writer | None = None
) -> Callable[[Params], tuple[dict[str, float], list[dict]]]:
    """Returns `evaluate(params) -> (metrics, samples)` over eval.num_prompts prompts of the evaluation split.

    The prompts and the noise are the same at every call, so that two evaluations differ by the parameters alone.
    writer: one to share with the caller (and its compilation), where it draws what the plan asks for.

    metrics: eval/pass@1 (mean over all samples), its standard error over prompts, eval/pass@k, lengths in tokens,
    truncated share.
    """
    writer = writer or make_writer(plan, model, tokenizer)
    source = prompt_source(plan.data, plan.data.eval_split, tokenizer)
    k = plan.evaluation.num_generations_eval
    count = min(plan.evaluation.num_prompts, len(source))
    # Equal calls, one compile, each of as many prompts as the devices can share evenly; what the last has too many is
    # dropped.
    parts = model.layout.parts("rows")
    width = -(-min(count, plan.evaluation.at_a_time) // parts) * parts
    check_rows(model.layout, **{"eval.num_prompts": width})
    generate = Generator(model.layout, source, writer.sampler, k)
    key = jax.random.fold_in(jax.random.key(plan.seed), EVAL_STREAM)

    def evaluate(params: Params) -> tuple[dict[str, float], list[dict]]:
        solved, lengths, truncated, samples = [], [], [], []
        params = writer.rollout_params(params)
        for start in range(0, count, width):
            kept = min(width, count - start) * k
            judged = judge(
                generate(params, start, width, jax.random.fold_in(key, start)), tokenizer, [source.task.reward], [1.0]
            )
            solved.append((judged.rewards_B[:kept] >= SOLVED).reshape(-1, k))
            lengths.append(judged.lengths_B[:kept])
            truncated.append(judged.truncated_B[:kept])
            for row, example, text in list(zip(judged.local_B, judged.examples, judged.texts, strict=True))[::k]:
                if row < kept:
                    samples.append(sample_line(example, text, judged.rewards_B[row]))
        solved_Qk = np.concatenate(solved)
        metrics = {
            "eval/pass@1": float(solved_Qk.mean()),
            "eval/pass@1_stderr": float(solved_Qk.mean(axis=1).std(ddof=1) / np.sqrt(count)) if count > 1 else 0.0,
            f"eval/pass@{k}": float(solved_Qk.any(axis=1).mean()),
            "eval/mean_length": float(np.concatenate(lengths).mean()),
            "eval/clipped_ratio": float(np.concatenate(truncated).mean()),
        }
        return metrics, samples

    return evaluate


def evaluate_workdir(plan: plans.RunPlan, workdir: str) -> tuple[int, dict[str, float], list[dict]]:
    """Evaluates the latest good checkpoint of a run. Returns (its step, metrics, samples)."""
    layout, tokenizer = make_layout(plan.mesh), dated_tokenizer(plan.data.tokenizer, plan.date)
    model = make_model(plan.model, tokenizer, layout)
    own = identity(model.spec, tokenizer)
    step, params = restore_params(
        workdir, abstract_params(model, layout), lambda where, saved: check_identity(where, saved, own)
    )
    return step, *make_evaluator(plan, model, tokenizer)(params)
