"""A run on random ids, to be measured: the parts of `gspo.rl`, with prompts of exactly max_prompt_length, and as many
ids that end a completion as are asked for.

Nothing of the program is built here a second time: the steps are those of `gspo.steps`, experience is collected by
`gspo.collect`, a step is what the loop of `gspo.rl` does between two evaluations.
"""

import time
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from gspo import plans, rl
from gspo.collect import Collector
from gspo.data.batches import PromptSource
from gspo.data.example import Example
from gspo.data.tasks import Task
from gspo.data.tokenizer import make_tokenizer
from gspo.report.flops import Sizes
from gspo.run.progress import Timer
from gspo.steps import initial_state, make_layout, make_steps
from gspo.types import Batch, Rollout

END_IDS = "num_end_ids"  # the one option of the task of random ids


class Ids:
    """A tokenizer (`gspo.data.tokenizer`) of numbers: "17 4 511" is [17, 4, 511]. The last id pads; the num_end_ids
    before it end a completion. Under random weights each id has a probability of about 1 / vocab_size, so lengths are
    about geometric, with mean vocab_size / num_end_ids; 0: all completions fill their frame."""

    def __init__(self, vocab_size: int, num_end_ids: int) -> None:
        self.spec, self.vocab_size, self.pad_id = "ids", vocab_size, vocab_size - 1
        self.eos_ids = tuple(range(vocab_size - 1 - num_end_ids, vocab_size - 1))

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(str(int(i)) for i in ids)

    def format_prompt(self, text: str) -> str:
        return text

    def prompt_ids(self, text: str) -> list[int]:
        return self.encode(text)

    def contents(self) -> dict[str, Any]:
        return {}


def random_task(tokenizer: Ids, length: int, size: int) -> Task:
    """Prompts of `length` random ids that end nothing."""
    plain = tokenizer.vocab_size - 1 - len(tokenizer.eos_ids)

    def example(index: int) -> Example:
        return Example(tokenizer.decode(np.random.default_rng(index).integers(0, plain, length)), answer="")

    return Task("random_ids", size, example, even_share)


def even_share(completion: str, _example: Example) -> float:
    """The share of even ids: a reward that differs from row to row."""
    ids = completion.split()
    return sum(int(word) % 2 == 0 for word in ids) / max(len(ids), 1)


class Work:
    """A run of a plan on random ids, up to its first rollout. Raises UserError as `gspo.rl.prepare` does."""

    def __init__(self, plan: plans.RLPlan) -> None:
        rows = plan.model.fields["vocab_size"] or make_tokenizer(plan.data.tokenizer).vocab_size
        self.plan, self.tokenizer = plan, Ids(rows, plan.data.options.get(END_IDS, 0))
        self.steps = make_steps(plan, make_layout(plan.mesh), self.tokenizer)
        self.spec = self.steps.model.spec
        width, prompts = plan.data.max_prompt_length, plan.rollout.num_prompts
        task = random_task(self.tokenizer, width, size=16 * prompts)
        self.source = PromptSource(task, self.tokenizer, max_prompt_length=width)
        self.collector = Collector(plan, self.steps, self.tokenizer, self.source)
        self.timer, self.index = Timer(), 0
        self.lengths_B: Any = None  # of the completions of the last rollout
        self.first_step_at = 0.0  # Unix time when the first step ended
        self.state = initial_state(plan, self.steps.start)
        self.key = jax.random.fold_in(jax.random.key(plan.seed), rl.ROLLOUT_STREAM)

    def sizes(self) -> Sizes:
        """Of the last rollout, or before it of one whose completions fill their frames."""
        plan, rollout = self.plan, self.plan.rollout
        width = plan.data.max_completion_length if self.lengths_B is None else float(np.mean(self.lengths_B))
        return Sizes(
            rollout.num_prompts, rollout.num_generations, plan.data.max_prompt_length, width, plan.updates_per_rollout
        )

    def collect(self) -> Batch:
        """The experience of the next rollout."""
        self.index += 1
        key = jax.random.fold_in(self.key, self.index)
        cursor = (self.index - 1) * self.plan.rollout.num_prompts
        batch = self.collector(self.state, cursor, key, self.timer).batch
        self.lengths_B = batch.completion_lengths_B
        return batch

    def update(self, batch: Batch) -> jax.Array:
        """All updates of a rollout; the new state is the work's own."""
        with self.timer("update"):
            self.state, _ = rl.update(self.steps, self.state, batch)
        return self.state.step

    def step(self) -> jax.Array:
        """What the loop does between two evaluations: seconds of its phases are in `timer`."""
        done = jax.block_until_ready(self.update(self.collect()))
        self.first_step_at = self.first_step_at or time.time()
        return done

    def rollout(self) -> Rollout:
        """The sampler alone, on the next prompts."""
        self.index += 1
        prompts, key = self.plan.rollout.num_prompts, jax.random.fold_in(self.key, self.index)
        params = self.steps.rollout_params(self.state.policy)
        rollout = self.collector.generate(params, (self.index - 1) * prompts, prompts, key).rollout
        self.lengths_B = rollout.completion_lengths_B
        return rollout

    def written(self) -> Rollout:
        """A rollout nobody sampled: random completions that fill their frames. No sampler is compiled for it."""
        sizes, rng = self.sizes(), np.random.default_rng(0)
        B, C = sizes.rows, self.plan.data.max_completion_length
        prompts = self.source.batch(0, sizes.prompts)
        completion_BC = rng.integers(0, self.tokenizer.pad_id - len(self.tokenizer.eos_ids), (B, C)).astype(np.int32)
        rollout = Rollout(
            tokens_BT=np.concatenate([np.repeat(prompts.tokens_QP, sizes.group, axis=0), completion_BC], axis=1),
            prompt_lengths_B=np.repeat(prompts.lengths_Q, sizes.group),
            completion_lengths_B=np.full((B,), C, np.int32),
            logp_BC=np.full((B, C), -np.log(self.tokenizer.vocab_size), np.float32),
            routes_LBTX=None,
            truncated_B=np.ones((B,), bool),
            decode_steps=np.int32(C),
        )
        return jax.jit(self.steps.layout.constrain_fields)(rollout)

    def batch(self) -> Batch:
        """A batch for updates, from `written`, with random advantages."""
        rollout = self.written()
        batch, _, _ = self.collector.score(self.state, rollout)
        rewards_B = np.random.default_rng(1).random(len(rollout.completion_lengths_B)).astype(np.float32)
        return self.collector.compare(self.state, batch, rewards_B, np.zeros_like(rewards_B, bool))
