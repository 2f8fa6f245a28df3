"""pass@1 and pass@k against counts by hand, and the evaluation of a finished run."""

import itertools
import json

import jax
import numpy as np
import pytest

from gspo import build, rl
from gspo.data.tasks import make_task
from gspo.evaluate import Writer, describe_scorer, evaluate_workdir, make_evaluator
from gspo.model.distribution import Sampling
from gspo.types import UserError
from tests.tiny_runs import command, contents, kept_compiles, parts_of, rl_config, written  # noqa: F401 - fixtures

K, C = 4, 6


@pytest.mark.parametrize(("count", "num_prompts"), [(5, 2), (5, 8), (4, 4), (1, 4)])
def test_pass_at_1_and_pass_at_k_are_those_counted_by_hand(tmp_path, count, num_prompts):
    # Catches rows of one prompt counted for another, the surplus of the last call counted too, pass@k of a mean, half
    # rewards taken for correct, lengths without the end token.
    config = rl_config(tmp_path, num_prompts=num_prompts, **{"eval.num_prompts": count, "eval.num_generations_eval": K})
    plan, tokenizer, _, model = parts_of(config)
    rng, seen = np.random.default_rng(0), []

    def sampler(params, prompt_QP, prompt_lengths_Q, key):
        assert len(prompt_QP) == min(count, num_prompts)
        texts_Qk = []
        for row, length in zip(np.asarray(prompt_QP), np.asarray(prompt_lengths_Q), strict=True):
            prompt = tokenizer.decode(row[-length:])
            right = prompt[-2]
            texts_Qk.append(
                [right if solved else rng.choice(["", "0101", right * 2, "111111"]) for solved in rng.random(K) < 0.4]
            )
            seen.append((prompt, texts_Qk[-1]))
        return written(texts_Qk, tokenizer, prompt_QP, prompt_lengths_Q, truncated=("111111",))

    metrics, samples = make_evaluator(plan, model, tokenizer, Writer(lambda params: params, sampler))({})
    drawn = seen[:count]
    solved = [[text == prompt[-2] for text in texts] for prompt, texts in drawn]
    texts = [text for _, row in drawn for text in row]
    means = [sum(row) / K for row in solved]
    assert metrics["eval/pass@1"] == pytest.approx(sum(map(sum, solved)) / (count * K))
    for k in range(2, K + 1):  # the share of all choices of k samples in which one is right
        chosen = [any(pick) for row in solved for pick in itertools.combinations(row, k)]
        assert metrics[f"eval/pass@{k}"] == pytest.approx(sum(chosen) / len(chosen))
    assert metrics["eval/avg@4"] == metrics["eval/pass@1"]  # rewards of 0 and 1
    spread = (sum((m - sum(means) / count) ** 2 for m in means) / (count - 1) / count) ** 0.5 if count > 1 else 0
    assert metrics["eval/pass@1_stderr"] == pytest.approx(spread)
    assert metrics["eval/mean_length"] == pytest.approx(np.mean([min(len(text) + 1, C) for text in texts]))
    assert metrics["eval/clipped_ratio"] == pytest.approx(np.mean([len(text) == C for text in texts]))
    assert [(s["prompt"], s["completion"]) for s in samples] == [(prompt, texts[0]) for prompt, texts in drawn]
    assert [s["reward"] for s in samples] == [float(row[0]) for row in solved]


def test_every_call_draws_the_same_prompts_with_the_same_keys_and_calls_differ(tmp_path):
    # Catches evaluations that cannot be compared because their noise differs, and batches of one evaluation that share
    # theirs.
    config = rl_config(tmp_path, **{"eval.num_prompts": 8})
    plan, tokenizer, _, model = parts_of(config)
    calls = []

    def sampler(params, prompt_QP, lengths_Q, key):
        calls.append((np.asarray(prompt_QP).tolist(), jax.random.key_data(key).tolist()))
        return written([["0"] * K] * len(prompt_QP), tokenizer, prompt_QP, lengths_Q)

    evaluate = make_evaluator(plan, model, tokenizer, Writer(lambda params: params, sampler))
    evaluate({})
    evaluate({})
    assert len(calls) == 4 and calls[:2] == calls[2:]
    assert calls[0][1] != calls[1][1] and calls[0][0] != calls[1][0]


def test_evaluation_reads_the_evaluation_split_and_the_reward_of_the_task(tmp_path):
    # Catches evaluation on training prompts, or by a reward that was shaped for training.
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(
            json.dumps({"prompt": {"train": "0=", "test": "1="}[split], "answer": "1"}) + "\n"
        )
    task = {"task.name": f"jsonl:{tmp_path}/{{split}}.jsonl", "task.eval_split": "test"}
    config = rl_config(tmp_path, rewards=("format_hash",), **task)
    plan, tokenizer, _, model = parts_of(config)

    def sampler(params, prompt_QP, lengths_Q, key):
        return written([["1"] * K], tokenizer, prompt_QP, lengths_Q)

    evaluate = make_evaluator(plan, model, tokenizer, Writer(lambda params: params, sampler))
    metrics, samples = evaluate({})
    assert metrics["eval/pass@1"] == 1 and samples[0]["prompt"] == "1="


def half_right(completion, example):
    """A reward whose values are not all 0 and 1."""
    return 1.0 if completion == example.answer else 0.5 * (completion[:1] == example.answer)


def test_evaluation_is_by_the_reward_that_was_asked_for_and_cut_as_was_asked_for(tmp_path):
    # Catches a file of data that is always judged by an exact match, a mean that counts what is solved, cuts that
    # training's sampler lends to evaluation or that are lost.
    plan = rl_config(tmp_path, **{"eval.reward": "tests.test_evaluate:half_right", "eval.top_p": 0.9, "eval.top_k": 3})
    plan, tokenizer, _, model = parts_of(plan)
    assert plan.evaluation.drawn[0] == Sampling(1.0, 3, 0.9) and plan.rollout.sampling == Sampling()

    def sampler(params, prompt_QP, lengths_Q, key):
        right = [tokenizer.decode(row)[-2] for row in np.asarray(prompt_QP)]
        return written([[r, r + "=", "=", "="] for r in right], tokenizer, prompt_QP, lengths_Q)

    metrics, samples = make_evaluator(plan, model, tokenizer, Writer(lambda params: params, sampler))({})
    assert (metrics["eval/pass@1"], metrics["eval/avg@4"], metrics["eval/pass@2"]) == (0.25, 0.375, 0.5)
    assert samples[0]["reward"] == 1


def test_the_log_says_by_what_evaluation_judges_and_warns_where_training_judges_otherwise(tmp_path):
    # Catches a pass@1 of 0 on a task that is solved, because only the text of the whole completion would do.
    def lines(**changes):
        config = rl_config(tmp_path, **changes)
        return describe_scorer(build.rl_plan(config), make_task(config.task.name, split="train"), config.rewards)

    said, warning = lines(rewards=("numeric_answer",), **{"eval.reward": ""})
    assert "exact_match" in said and warning.startswith("warning: eval.reward: ") and "numeric_answer" in warning
    for rewards in (("task",), ("exact_match", "format_hash")):
        assert len(lines(rewards=rewards, **{"eval.reward": ""})) == 1
    (said,) = lines(rewards=("numeric_answer",), **{"eval.reward": "numeric_answer"})
    assert said == "evaluation counts what numeric_answer gives 1 as solved"


@pytest.mark.parametrize("field", ["eval.num_prompts", "eval.num_generations_eval"])
def test_an_evaluation_of_nothing_is_refused(tmp_path, field):
    # Catches a mean over no prompts, which is NaN.
    config = rl_config(tmp_path, **{field: 0})
    with pytest.raises(UserError, match=f"{field}=0: must be positive"):
        rl.prepare(build.rl_plan(config))


def test_a_finished_run_is_evaluated_as_the_run_evaluated_itself_and_left_alone(tmp_path, command):  # noqa: F811
    # Catches other parameters than the last ones, other prompts or other noise than in training, a script that writes,
    # and one that trips over the schedule of an optimizer that it has no use for.
    line = rl.train(build.rl_plan(rl_config(tmp_path)), tmp_path / "run")
    before = contents(tmp_path / "run")
    changes = {"optimizer.schedule": "linear", "optimizer.warmup_steps": 3}
    step, metrics, samples = evaluate_workdir(build.rl_plan(rl_config(tmp_path, **changes)), tmp_path / "run")
    assert step == 3 and metrics == line and len(samples) == 4
    (tmp_path / "config.py").write_text(
        f"from tests.tiny_runs import rl_config\nget_config = lambda: rl_config({str(tmp_path)!r})\n"
    )
    code, stdout, stderr = command("evaluate", f"--config={tmp_path}/config.py", f"--workdir={tmp_path}/run")
    *printed, last = map(json.loads, stdout.splitlines())
    assert (code, stderr) == (0, "") and last == {"step": 3} | metrics and printed == samples[:2]
    code, stdout, stderr = command("evaluate", f"--config={tmp_path}/config.py", f"--workdir={tmp_path}/nowhere")
    assert (
        (code, stdout) == (2, "")
        and stderr.startswith(f"error: no checkpoint in {tmp_path}/nowhere")
        and stderr.count("\n") == 1
    )
    best = ["--step=best"], ["--step=7"], ["--step=last"]
    (none, seventh, last) = (
        command("evaluate", f"--config={tmp_path}/config.py", f"--workdir={tmp_path}/run", *step)[2] for step in best
    )
    assert none == "" and "no checkpoint of step 7 can be read; there are steps 2, 3" in seventh
    assert last == "error: --step=last: give the number of a step, or best; leave it out for the latest\n"
    assert contents(tmp_path / "run") == before and not (tmp_path / "nowhere").exists()
