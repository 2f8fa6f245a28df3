"""Evaluation on held-out prompts: pass@1 over k samples, pass@k, lengths."""

from collections.abc import Callable

import jax
import numpy as np
from ml_collections import ConfigDict

from gspo import build, distributed
from gspo.checkpoint import restore_params
from gspo.data import batches
from gspo.data.tokenizer import Tokenizer
from gspo.hf import abstract_params
from gspo.model.distribution import Sampling
from gspo.model.transformer import Transformer
from gspo.sharding import Layout
from gspo.types import Params

SOLVED = 1.0 - 1e-6  # a completion is correct when the task's own reward is 1
EVAL_STREAM = 2  # of the run's random keys; the loops use 1, initialisation 0


def make_evaluator(
    config: ConfigDict, layout: Layout, model: Transformer, tokenizer: Tokenizer, *, sampler: Callable | None = None
) -> Callable[[Params], tuple[dict[str, float], list[dict]]]:
    """Returns `evaluate(params) -> (metrics, samples)` over config.eval.num_prompts prompts of the evaluation split.

    The prompts and the noise are the same at every call, so that two evaluations differ by the parameters alone. sampler: one to
    share with the caller (and its compilation), where it draws what config.eval asks for.

    metrics: eval/pass@1 (mean over all samples), its standard error over prompts, eval/pass@k, lengths in tokens, truncated share.
    """
    build.positive(config, "eval.num_prompts", "eval.num_generations_eval")
    source = build.prompt_source(config, config.task.eval_split, tokenizer)
    k = config.eval.num_generations_eval
    count = min(config.eval.num_prompts, len(source))
    width = min(count, config.get("num_prompts", count))  # equal calls, one compile; what the last has too many is dropped
    build.check_rows(layout, **{"eval.num_prompts": width})
    if sampler is None:
        sampled = model.clone(layout=build.rollout_layout(config, layout))
        sampler = build.sampler(config, sampled, tokenizer, Sampling(config.eval.temperature), k)
    rollout_params = build.rollout_params(config, model, layout)
    rows = layout.sharding("rows")
    own_Q = distributed.own_rows(rows, width)
    own_B = np.concatenate([np.arange(q * k, (q + 1) * k) for q in own_Q])
    key = jax.random.fold_in(jax.random.key(config.seed), EVAL_STREAM)

    def evaluate(params: Params) -> tuple[dict[str, float], list[dict]]:
        solved, lengths, truncated, samples = [], [], [], []
        params = rollout_params(params)
        for start in range(0, count, width):
            prompts, kept = source.batch(start, width, own_Q), min(width, count - start)
            prompt_rows = distributed.put_rows(rows, own_Q, width, prompts.tokens_QP, prompts.lengths_Q)
            rollout = sampler(params, *prompt_rows, jax.random.fold_in(key, start))
            own_tokens_BT, own_lengths_B, own_truncated_B = distributed.fetch_rows(
                own_B, rollout.tokens_BT, rollout.completion_lengths_B, rollout.truncated_B
            )
            texts = batches.completion_texts(tokenizer, own_tokens_BT, prompts.tokens_QP.shape[1], own_lengths_B)
            examples = [example for example in prompts.examples for _ in range(k)]
            own_rewards_B, _ = batches.score_completions(texts, examples, [source.task.reward], [1.0])
            rewards_B, lengths_B, truncated_B = distributed.gather_rows(
                own_B, width * k, own_rewards_B, own_lengths_B, own_truncated_B
            )
            solved.append((rewards_B >= SOLVED).reshape(width, k)[:kept])
            lengths.append(lengths_B[: kept * k])
            truncated.append(truncated_B[: kept * k])
            for q, example, text, reward in zip(own_Q, prompts.examples, texts[::k], own_rewards_B[::k], strict=True):
                if q < kept:
                    samples.append({"prompt": example.prompt, "completion": text, "answer": example.answer, "reward": float(reward)})
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
