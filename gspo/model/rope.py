"""Rotary positions, and the rules that slow their waves down so that a model reads texts longer than it was trained on.

A rule in a ModelSpec is a tuple (`rule_of` says which): plain values, so that it can be hashed, saved as JSON and
written in a config.
"""

import math
from typing import NamedTuple

import chex
import jax.numpy as jnp


class Linear(NamedTuple):
    """All waves are slowed down by `factor` (2306.15595)."""

    factor: float

    def valid(self) -> bool:
        return self.factor > 0

    def slowed(self, frequency_h: chex.Array, theta: float) -> chex.Array:
        return frequency_h / self.factor

    def amplitude(self) -> float:
        return 1.0


class Llama3(NamedTuple):
    """Llama 3.1 (2407.21783): waves that turn more than `high` times within the trained length stay, those that turn
    less than `low` times are slowed down by `factor`, and those between are interpolated by their number of turns."""

    factor: float
    low: float
    high: float
    trained_length: float

    def valid(self) -> bool:
        return min(self) > 0 and self.low < self.high

    def slowed(self, frequency_h: chex.Array, theta: float) -> chex.Array:
        turns_h = self.trained_length * frequency_h / (2 * jnp.pi)
        return _between(frequency_h, self.factor, jnp.clip((turns_h - self.low) / (self.high - self.low), 0.0, 1.0))

    def amplitude(self) -> float:
        return 1.0


class Yarn(NamedTuple):
    """YaRN (2309.00071): as Llama3 with `fast` and `slow` turns for high and low, but interpolated by the wave's place
    among all; and queries and keys are multiplied by `attention` each. None: 0.1 ln factor + 1. truncate: the places
    where the interpolation begins and ends are rounded to whole ones."""

    factor: float
    trained_length: float
    fast: float = 32.0
    slow: float = 1.0
    attention: float | None = None
    truncate: bool = True

    def valid(self) -> bool:
        positive = min(self.factor, self.trained_length, self.slow) > 0 and (
            self.attention is None or self.attention > 0
        )
        return positive and self.slow < self.fast and isinstance(self.truncate, bool)

    def slowed(self, frequency_h: chex.Array, theta: float) -> chex.Array:
        width = 2 * frequency_h.shape[0]
        # Where in [0, H/2) the wave stands that turns so many times within the trained length.
        begin, end = (
            width * math.log(self.trained_length / (turns * 2 * math.pi)) / (2 * math.log(theta))
            for turns in (self.fast, self.slow)
        )
        if self.truncate:
            begin, end = math.floor(begin), math.ceil(end)
        begin, end = max(begin, 0), min(end, width - 1)
        place_h = (jnp.arange(width // 2, dtype=jnp.float32) - begin) / (end - begin if end != begin else 0.001)
        return _between(frequency_h, self.factor, 1.0 - jnp.clip(place_h, 0.0, 1.0))

    def amplitude(self) -> float:
        if self.attention is not None:
            return self.attention
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


def _between(frequency_h: chex.Array, factor: float, kept_h: chex.Array) -> chex.Array:
    """kept 1: the wave stays; 0: it is slowed down by the factor."""
    return frequency_h * (kept_h + (1 - kept_h) / factor)


Rule = Linear | Llama3 | Yarn
NAMED = {"linear": Linear, "yarn": Yarn}
FORMS = (
    'give () for none, ("linear", factor), ("yarn", factor, trained_length[, fast, slow, attention, truncate]), or the '
    "four numbers (factor, low, high, trained_length) of Llama 3.1; all positive, low < high, slow < fast"
)


def rule_of(scaling: tuple) -> Rule | None:
    """The rule that a tuple stands for: a name and its numbers, or the four numbers of Llama 3.1; None for (). Raises
    ValueError for any other."""
    if not scaling:
        return None
    kind, numbers = (NAMED.get(scaling[0]), scaling[1:]) if isinstance(scaling[0], str) else (Llama3, scaling)
    try:
        rule = kind(*numbers)
        valid = rule.valid()
    except TypeError:  # an unknown name, too many or too few numbers, something that is no number
        valid = False
    if not valid:
        raise ValueError(FORMS)
    return rule


def rope_tables(
    positions_BT: chex.Array, width: int, theta: float, scaling: tuple = ()
) -> tuple[chex.Array, chex.Array]:
    """Positions -> float32 (cos, sin), each [B, T, W/2]: angle p · θ^(-2i/W) (Su et al. 2021, "rotate half" layout of
    Llama), W numbers of each head. scaling: see `rule_of`."""
    frequency_h = theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    rule = rule_of(scaling)
    if rule is not None:
        frequency_h = rule.slowed(frequency_h, theta)
    angle = positions_BT[:, :, None].astype(jnp.float32) * frequency_h
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if rule is not None and rule.amplitude() != 1:
        cos, sin = rule.amplitude() * cos, rule.amplitude() * sin
    return cos, sin


def apply_rope(x_BTNH: chex.Array, cos_BTh: chex.Array, sin_BTh: chex.Array) -> chex.Array:
    """Rotates the pairs (x_i, x_{i+W/2}) of the first W numbers of each head by their angle and leaves the others;
    float32 inside, dtype of x outside."""
    half = cos_BTh.shape[-1]
    left, right, rest = jnp.split(x_BTNH, (half, 2 * half), axis=-1)
    left, right = left.astype(jnp.float32), right.astype(jnp.float32)
    cos, sin = cos_BTh[:, :, None, :], sin_BTh[:, :, None, :]
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x_BTNH.dtype)
    return turned if rest.shape[-1] == 0 else jnp.concatenate([turned, rest], axis=-1)
