"""Judges: two completions of one prompt -> by how much the first is the better one.

A judge is a reward, which then sees each completion alone, or a language model that is asked to compare the two: AI
feedback in place of people's (RLAIF, 2309.00267 §2.1).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gspo.data.batches import left_padded
from gspo.policy import Policy, load_policy, prompt_width
from gspo.types import UserError

MODEL_PREFIX = "model:"  # of judges that are language models; what follows names their folder
NAMES = ("A", "B")  # of the two completions, in the question
TEMPLATE = """Which of two answers to a question is better?

Question: {prompt}

Answer A: {first}

Answer B: {second}

Reply with A or B alone."""


class Verdicts(NamedTuple):
    """Of N pairs. preference_N float64: by how much the first is the better one, > 0 where it is. firm_N bool: whether
    the judge said the same with the two exchanged."""

    preference_N: np.ndarray
    firm_N: np.ndarray


class ModelJudge:
    """The log-odds of "A" against "B" as the next token after the question, once in each order:

        d = ½ [ (l_A − l_B)(first, second) − (l_A − l_B)(second, first) ]

    so that a liking for one of the two places cancels (2309.00267 §3.1). rows: questions at a time."""

    def __init__(self, policy: Policy, template: str = TEMPLATE, rows: int = 16) -> None:
        self.policy, self.template, self.rows = policy, template, rows
        ids = [policy.tokenizer.encode(name) for name in NAMES]
        if any(len(each) != 1 for each in ids):
            raise UserError(f"judge: its tokenizer writes {' or '.join(NAMES)} by several tokens; name another model")
        self._log_odds = _log_odds_fn(policy, *(each[0] for each in ids))

    def __call__(self, prompts: Sequence[str], firsts: Sequence[str], seconds: Sequence[str]) -> Verdicts:
        asked = self._asked(prompts, firsts, seconds) + self._asked(prompts, seconds, firsts)
        forward_N, backward_N = np.split(self._scores(asked), 2)
        return Verdicts((forward_N - backward_N) / 2, forward_N * backward_N < 0)

    def _asked(self, prompts: Sequence[str], firsts: Sequence[str], seconds: Sequence[str]) -> list[list[int]]:
        texts = [
            self.template.format(prompt=prompt, first=first, second=second)
            for prompt, first, second in zip(prompts, firsts, seconds, strict=True)
        ]
        return [self.policy.tokenizer.prompt_ids(text) for text in texts]

    def _scores(self, ids: list[list[int]]) -> np.ndarray:
        """[N] float64. Those of about one length together, so that few frames are mostly padding."""
        scores_N, pad_id = np.zeros(len(ids)), self.policy.tokenizer.pad_id
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        for start in range(0, len(order), self.rows):
            part = order[start : start + self.rows]
            rows = [ids[i] for i in (part + part[:1] * self.rows)[: self.rows]]  # always as many: one compile a width
            width = prompt_width(max(map(len, rows)))
            lengths_B = np.array([len(row) for row in rows], np.int32)
            found_B = self._log_odds(self.policy.params, left_padded(rows, width, pad_id), lengths_B)
            scores_N[part] = np.asarray(found_B, np.float64)[: len(part)]
        return scores_N


def _log_odds_fn(policy: Policy, a: int, b: int) -> Callable[..., jax.Array]:
    model = policy.model

    @jax.jit
    def log_odds(params, tokens_BT, lengths_B):
        out = model.apply({"params": params}, tokens_BT, tokens_BT.shape[1] - lengths_B)
        logits_BV = model.apply({"params": params}, out.hidden_BTD[:, -1], method="logits")
        return (logits_BV[:, a] - logits_BV[:, b]).astype(jnp.float32)

    return log_odds


def load_judge(name: str, template: str) -> ModelJudge:
    """The language model in the folder that "model:FOLDER" names. Raises UserError."""
    folder = name.removeprefix(MODEL_PREFIX)
    return ModelJudge(load_policy(folder, f"judge={name!r}"), template or TEMPLATE)
