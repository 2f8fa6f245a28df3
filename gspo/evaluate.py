"""Evaluation on held-out prompts: pass@1 over k samples, pass@k, lengths."""

from collections.abc import Callable

import jax
import numpy as np
from ml_collections import ConfigDict

from gspo import build
from gspo.collect import judge, sample, sample_line
from gspo.data.tokenizer import Tokenizer
from gspo.hf.folder import abstract_params
from gspo.model.distribution import Sampling
from gspo.model.transformer import Transformer
from gspo.parallel import distributed
from gspo.parallel.sharding import Layout
from gspo.run.checkpoint import restore_params
from gspo.types import Params

SOLVED = 1.0 - 1e-6  # a completion is correct when the task's own reward is 1
EVAL_STREAM = 2  # of the run's random keys; the loops use 1, initialisation 0


def make_evaluator(
    config: ConfigDict,
    layout: Layout,
    model: Transformer,
    tokenizer: Tokenizer,
    *,
    sampler: Callable | None = None,
    rollout_params: Callable[[Params], Params] | None = None,
) -> Callable[[Params], tuple[dict[str, float], list[dict]]]:
    """Returns `evaluate(params) -> (metrics, samples)` over config.eval.num_prompts prompts of the evaluation split.

    The prompts and the noise are the same at every call, so that two evaluations differ by the parameters alone.
    sampler: one to share with the caller (and its compilation), where it draws what config.eval asks for.
    rollout_params: likewise, what maps the parameters to those that it reads.

    metrics: eval/pass@1 (mean over all samples), its standard error over prompts, eval/pass@k, lengths in tokens,
    truncated share."""
    build.positive(config, "eval.num_prompts", "eval.num_generations_eval")
    source = build.prompt_source(config, config.task.eval_split, tokenizer)
    k = config.eval.num_generations_eval
    count = min(config.eval.num_prompts, len(source))
    width = min(
        count, config.get("num_prompts", count)
    )  # equal calls, one compile; what the last has too many is dropped
    build.check_rows(layout, **{"eval.num_prompts": width})
    if sampler is None:
        sampled = model.clone(layout=build.rollout_layout(config, layout))
        sampler = build.sampler(config, sampled, tokenizer, Sampling(config.eval.temperature), k)
    rollout_params = rollout_params or build.rollout_params(config, model, layout)
    key = jax.random.fold_in(jax.random.key(config.seed), EVAL_STREAM)

    def evaluate(params: Params) -> tuple[dict[str, float], list[dict]]:
        solved, lengths, truncated, samples = [], [], [], []
        params = rollout_params(params)
        for start in range(0, count, width):
            kept = min(width, count - start) * k
            sampled = sample(layout, source, sampler, params, start, width, k, jax.random.fold_in(key, start))
            draw = judge(sampled, tokenizer, [source.task.reward], [1.0])
            lengths_B, truncated_B = distributed.fetch((draw.rollout.completion_lengths_B, draw.rollout.truncated_B))
            solved.append((draw.rewards_B[:kept] >= SOLVED).reshape(-1, k))
            lengths.append(lengths_B[:kept])
            truncated.append(truncated_B[:kept])
            for row, example, text in list(zip(draw.own_B, draw.examples, draw.texts, strict=True))[::k]:
                if row < kept:
                    samples.append(sample_line(example, text, draw.rewards_B[row]))
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


def evaluate_workdir(config: ConfigDict, workdir: str) -> tuple[int, dict[str, float], list[dict]]:
    """Evaluates the latest good checkpoint of a run. Returns (its step, metrics, samples)."""
    layout, tokenizer = build.layout(config), build.tokenizer(config)
    model = build.model(config, tokenizer, layout)
    step, params = restore_params(workdir, abstract_params(model.spec, layout))
    metrics, samples = make_evaluator(config, layout, model, tokenizer)(params)
    return step, metrics, samples
