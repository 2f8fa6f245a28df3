"""running_sum: a toy whose demonstrator errs at a known rate: the pass@1 of a cold start is known in advance."""

import random
import zlib

from gspo.data.example import Example
from gspo.data.rewards import exact_match
from gspo.data.tasks.task import Task, check_split
from gspo.types import UserError


def make(
    rest: str,
    *,
    split: str,
    seed: int,
    size: int | None,
    num_digits: int = 12,
    modulus: int = 10,
    error_rate: float = 0.12,
) -> Task:
    """Prompt "314=", answer "348": the running sums of the digits modulo `modulus`, one character each.

    The demonstrator writes a uniform wrong digit with probability `error_rate` at each step and goes on from what it
    wrote. A policy that imitates it perfectly is therefore right with probability (1 - error_rate) ** num_digits, and
    its errors are not a matter of what it can represent: a cold start of known pass@1. No prompt is in both splits: its
    checksum decides."""
    check_split("running_sum", split)
    for field, value, good in (
        ("num_digits", num_digits, num_digits >= 1),
        ("modulus", modulus, 2 <= modulus <= 10),
        ("error_rate", error_rate, 0 <= error_rate <= 1),
    ):
        if not good:
            ranges = "num_digits >= 1, modulus 2..10, error_rate 0..1"
            raise UserError(f"task.options.{field}={value}: out of range ({ranges})")

    def example(index: int) -> Example:
        rng = random.Random(f"{seed}/{split}/{index}")  # a string seeds through SHA-512: the same on every machine
        for _ in range(10_000):
            digits = f"{rng.randrange(10**num_digits):0{num_digits}d}"
            if (zlib.crc32(digits.encode()) % 8 == 0) == (split == "test"):
                break
        else:
            raise UserError(
                f"task.options.num_digits={num_digits}: too few prompts for a {split} split of its own; use 3 digits "
                "or more"
            )
        right = written = 0
        answer, demonstration = [], []
        for digit in map(int, digits):
            right, written = (right + digit) % modulus, (written + digit) % modulus
            if rng.random() < error_rate:
                written = (written + rng.randrange(1, modulus)) % modulus
            answer.append(str(right))
            demonstration.append(str(written))
        return Example(f"{digits}=", "".join(answer), "".join(demonstration))

    example(0)  # so that too few digits are an error now
    return Task("running_sum", size or (40_000 if split == "train" else 2_000), example, exact_match)
