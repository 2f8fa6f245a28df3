"""arithmetic: questions of one step in plain English, for pretrained models; the last number of the completion counts.

SmolLM2-135M-Instruct answers a fifth of them before any training, which is where reinforcement learning has something
to choose from."""

import random
import zlib

from gspo.data.example import Example
from gspo.data.rewards import numeric_answer
from gspo.data.tasks.task import Task, check_split, first
from gspo.types import UserError

RANGES = {"product": (2, 12), "largest": (10, 99)}  # of the numbers, both ends included
NUMBERS = 4  # among which the largest is sought
SIZES = {"train": 4_000, "test": 500}


def make(
    rest: str,
    *,
    split: str,
    seed: int,
    size: int | None,
    kind: str = "product",
    low: int | None = None,
    high: int | None = None,
) -> Task:
    """kind  "product": "What is 7 times 8? Answer with a number."
             "largest": "Which number is the largest: 31, 87, 42, 65?"
    low, high  range of the numbers; None: as in RANGES

    Products are all that there are, each once; the largest number is sought among four different ones, drawn for each
    index. No problem is in both splits, in whatever order its numbers stand: their checksum decides, and gives the test
    split a quarter. The demonstration is the number alone."""
    check_split("arithmetic", split)
    if kind not in RANGES:
        raise UserError(f"task.options.kind={kind!r}: choose one of {', '.join(RANGES)}")
    low, high = (usual if given is None else given for given, usual in zip((low, high), RANGES[kind], strict=True))
    fewest = NUMBERS + 2 if kind == "largest" else 4  # so that both splits have some, but for 2 in 100 values of low
    if low < 0 or high - low + 1 < fewest:
        raise UserError(
            f"task.options.low={low}, task.options.high={high}: must be >= 0 and at least {fewest - 1} apart"
        )
    if kind == "product":
        numbers = range(low, high + 1)
        pairs = [(a, b) for a in numbers for b in numbers if _split_of(a, b) == split]
        random.Random(f"{seed}").shuffle(pairs)  # so that the first `size` are no table of one factor
        return Task("arithmetic", first("arithmetic", len(pairs), size), lambda i: _product(*pairs[i]), numeric_answer)

    def largest(index: int) -> Example:
        rng = random.Random(f"{seed}/{split}/{index}")  # a string seeds through SHA-512: the same on every machine
        for _ in range(10_000):
            drawn = rng.sample(range(low, high + 1), NUMBERS)
            if _split_of(*drawn) == split:
                break
        else:
            raise UserError(
                f"task.options.low={low}, task.options.high={high}: too few numbers for a {split} split of its own; "
                "choose them further apart"
            )
        answer = str(max(drawn))
        listed = ", ".join(map(str, drawn))
        return Example(f"Which number is the largest: {listed}?", answer, answer)

    largest(0)  # so that too narrow a range is an error now
    return Task("arithmetic", size or SIZES[split], largest, numeric_answer)


def _product(a: int, b: int) -> Example:
    return Example(f"What is {a} times {b}? Answer with a number.", str(a * b), str(a * b))


def _split_of(*numbers: int) -> str:
    return "test" if zlib.crc32(repr(sorted(numbers)).encode()) % 4 == 0 else "train"
