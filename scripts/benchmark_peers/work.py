"""The work that all systems do, and how a peer's script reports it.

One RL step: 8 prompts of 32 ids, 8 completions of 64 ids each (no id ends one), temperature 1, a reward in plain
Python, old log-probs of the 64 rows, then 4 updates of 16 rows: sequence-level ratios, no KL term, AdamW, clip 1.0.
Model: float32, random, untied embeddings, 4 layers of width 128, 4 heads of 32, 2 of keys; feed-forward width 256, or 8
experts of width 128 of which 2 run. The same is configs/benchmark.py:dense and :moe.
"""

import argparse
import json
import random
import resource
import statistics
import time

VOCAB, WIDTH, LAYERS, HEADS, KV_HEADS, HEAD_WIDTH, ROPE_THETA = 512, 128, 4, 4, 2, 32, 1_000_000
D_FF, EXPERTS, EXPERTS_PER_TOKEN, D_EXPERT = 256, 8, 2, 128
PROMPTS, PROMPT, GROUP, COMPLETION, UPDATES = 8, 32, 8, 64, 4
ROWS = PROMPTS * GROUP
MINIBATCH = ROWS // UPDATES
END, PAD = VOCAB, VOCAB + 1  # ids that the model has no rows for, so that nothing ends early
LEARNING_RATE, EPSILON, EPSILON_HIGH = 1e-5, 3e-4, 4e-4
PHASES = ("step", "rollout", "old_logps", "update")


def options(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", choices=["moe", "dense"], default="moe")
    parser.add_argument("--steps", type=int, default=7, help="steps that count")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", required=True)
    return parser.parse_args()


def prompts() -> list[list[int]]:
    drawn = random.Random(1)
    return [[drawn.randrange(VOCAB) for _ in range(PROMPT)] for _ in range(PROMPTS)]


def even_share(ids: list[int]) -> float:
    """The reward."""
    assert len(ids) == COMPLETION, len(ids)
    return sum(i % 2 == 0 for i in ids) / len(ids)


class Steps:
    """Seconds of the phases of each step, collected while a system runs."""

    def __init__(self) -> None:
        self.done: list[dict[str, float]] = []
        self.first_step_at = 0.0
        self.begin()

    def begin(self) -> None:
        self.now = dict.fromkeys(PHASES, 0.0)
        self.began = time.perf_counter()

    def add(self, phase: str, since: float) -> None:
        self.now[phase] += time.perf_counter() - since

    def end(self) -> None:
        self.now["step"] = time.perf_counter() - self.began
        self.done.append(self.now)
        self.first_step_at = self.first_step_at or time.time()
        self.begin()

    def write(self, path: str, warmup: int, **told) -> None:
        """Median of each phase over the steps after the warm-up, where there are any; when the first step ended."""
        counted = self.done[warmup:]
        result = {phase: statistics.median(step[phase] for step in counted) for phase in PHASES if counted}
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        with open(path, "w") as file:
            json.dump({**result, **told, "first_step_at": self.first_step_at, "rss_bytes": rss}, file)
