"""Preferences from a judge instead of from people: a policy draws two completions of each prompt, a judge says which is
the better one, and lines of {"prompt", "chosen", "rejected"} are written, which `gspo.reward_model` and `gspo.dpo` are
trained on.

    runs/preferences/<split>.jsonl    the pairs of each split: task.name="jsonl:runs/preferences/{split}.jsonl"
    runs/preferences/labels.json      how many there are, how many were left out and why, what the judge gave

A line has "difference" too, by how much the judge likes the chosen text better; task.options.margin_field="difference"
makes it the margin of the loss. Prompts that are conversations are written as they are shown.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gspo.data.scoring import make_scorer
from gspo.evaluate import make_writer
from gspo.generate import Generator, Judged, check_splits, judge, prompt_source
from gspo.judge import MODEL_PREFIX, ModelJudge, Verdicts, load_judge
from gspo.resume import tokenizer_of_run
from gspo.run import disk
from gspo.run.identity import identity, restore_known
from gspo.run.progress import Progress
from gspo.run.workdir import hold_workdir, keep_config
from gspo.steps import check_rows, make_layout, make_model
from gspo.supervised_plans import LabelPlan
from gspo.types import UserError

SUMMARY = "labels.json"
LABEL_STREAM = 4  # of the random keys of a seed


def label(plan: LabelPlan, workdir: str, *, allow_changed_config: bool = False) -> dict[str, Any]:
    """Writes the pairs of both splits. Returns what labels.json says: {split: {"prompts", "pairs", "left_out": {why:
    count}, "firm": share of judgements that stand when the two are exchanged (judges that are models), "mean" and
    "std" of what the judge gave to single completions (rewards)}}. What is there is not made again. Raises UserError.
    """
    if jax.process_count() > 1:
        raise UserError(f"labels are written by one process, and this is one of {jax.process_count()}")
    with hold_workdir(workdir, dict(plan.written), allow_changed_config=allow_changed_config) as folder:
        if (folder / SUMMARY).exists():
            return json.loads((folder / SUMMARY).read_text())
        made = {}
        work = _Labeller(plan)
        for turn, (split, count) in enumerate(((plan.data.train_split, plan.num_prompts),
                                               (plan.data.eval_split, plan.num_eval_prompts))):  # fmt: skip
            lines, made[split] = work(split, count, turn)
            if not lines:
                raise UserError(
                    f"task.name={plan.data.task!r}: none of the {count} prompts of split {split!r} gave a pair: "
                    f"{_told(made[split])}"
                )
            text = "".join(json.dumps(line) + "\n" for line in lines)
            disk.write_whole(folder / f"{split}.jsonl", text)
        keep_config(folder, dict(plan.written))
        disk.write_whole(folder / SUMMARY, json.dumps(made, indent=1) + "\n")
        return made


class _Labeller:
    """labeller(split, count, turn) -> (lines, summary)."""

    def __init__(self, plan: LabelPlan) -> None:
        self.plan, self.layout = plan, make_layout(plan.mesh)
        self.tokenizer = tokenizer_of_run(plan)
        self.at_a_time = min(plan.prompts_at_a_time, max(plan.num_prompts, plan.num_eval_prompts))
        check_rows(self.layout, prompts_at_a_time=self.at_a_time)
        check_splits(plan.data)
        model = make_model(plan.model, self.tokenizer, self.layout)
        _, params = restore_known(plan.init_from, model, self.layout, identity(model.spec, self.tokenizer))
        writer = make_writer(plan, model, self.tokenizer, (plan.sampling, 2, 0))
        self.params, self.sampler = writer.rollout_params(params), writer.sampler
        of_model = plan.judge.startswith(MODEL_PREFIX)
        self.judge: ModelJudge | None = load_judge(plan.judge, plan.judge_template) if of_model else None

    def __call__(self, split: str, count: int, turn: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        plan, tokenizer, width = self.plan, self.tokenizer, self.at_a_time
        source = prompt_source(plan.data, split, tokenizer)
        count = min(count, len(source))
        reward = "task" if self.judge else plan.judge
        scorer = make_scorer([reward], source.task, judging=plan.judging, field="judge")
        generate = Generator(self.layout, source, self.sampler, 2, plan.data.stop)
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(plan.seed), LABEL_STREAM), turn)
        rng = np.random.default_rng([plan.seed % 2**32, LABEL_STREAM, turn])
        lines, left_out, given, firm = [], {}, [], []
        with Progress(count, start=0, title=f"labels of {split}", shown=()) as progress:
            for start in range(0, count, width):
                completions = generate(self.params, start, width, jax.random.fold_in(key, start))
                judged = judge(completions, tokenizer, scorer, plan.data.stop)
                kept = min(width, count - start)
                verdicts = self._verdicts(judged)
                given.append(judged.rewards_B[: 2 * kept])
                firm.append(verdicts.firm_N[:kept])
                for q in range(kept):
                    line = _line(judged, q, verdicts.preference_N[q], plan.label_temperature, rng)
                    if isinstance(line, str):
                        left_out[line] = left_out.get(line, 0) + 1
                    else:
                        lines.append(line)
                progress.update(min(start + width, count) - 1, {})
        summary = {"prompts": count, "pairs": len(lines), "left_out": left_out}
        if self.judge:
            return lines, summary | {"firm": float(np.concatenate(firm).mean())}
        given_B = np.concatenate(given).astype(np.float64)
        return lines, summary | {"mean": float(given_B.mean()), "std": float(given_B.std())}

    def _verdicts(self, judged: Judged) -> Verdicts:
        firsts, seconds = judged.texts[::2], judged.texts[1::2]
        if self.judge:
            return self.judge([example.prompt for example in judged.examples[::2]], firsts, seconds)
        rewards_N2 = judged.rewards_B.astype(np.float64).reshape(-1, 2)
        return Verdicts(rewards_N2[:, 0] - rewards_N2[:, 1], np.ones(len(rewards_N2), bool))


def _line(judged: Judged, q: int, preference: float, temperature: float, rng: np.random.Generator) -> Any:
    """A line of the file, or why there is none. temperature: of labels that are drawn, as Bradley and Terry have it,
    with σ(preference / temperature); 0: the better one is chosen."""
    drawn = rng.random()  # one for each pair, whatever becomes of it
    first, second = judged.texts[2 * q : 2 * q + 2]
    if first == second:
        return "equal texts"
    if judged.truncated_B[2 * q : 2 * q + 2].any():
        return "a text that was cut off"
    if judged.failed_BR[2 * q : 2 * q + 2].any():
        return "a judge that failed"
    if preference == 0:
        return "a tie"
    better = preference > 0 if temperature == 0 else drawn < 1 / (1 + np.exp(-preference / temperature))
    chosen, rejected = (first, second) if better else (second, first)
    difference = float(preference if better else -preference)
    return {
        "prompt": judged.examples[2 * q].prompt, "chosen": chosen, "rejected": rejected, "difference": difference,
    }  # fmt: skip


def _told(summary: dict[str, Any]) -> str:
    return ", ".join(f"{count} had {why}" for why, count in summary["left_out"].items())


def pairs_of(workdir: str | Path) -> str:
    """The name by which a config knows the pairs in a folder."""
    return f"jsonl:{Path(workdir)}/{{split}}.jsonl"
