"""One problem, as every task gives it and every reward reads it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Example:
    """`demonstration` is a whole completion to imitate (SFT); `metadata` is for the reward of its own task."""

    prompt: str
    answer: str
    demonstration: str | None = None
    metadata: Mapping[str, Any] | None = None
