"""Rotary rules of a config.json (`rope_scaling`, or `rope_parameters` in transformers 5) <-> `gspo.model.rope`."""

import math
from collections.abc import Mapping
from typing import Any

from gspo.model.rope import Linear, Llama3, Yarn, rule_of
from gspo.types import UserError

LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def scaling_from_hf(config: Mapping[str, Any]) -> tuple:
    """`ModelSpec.rope_scaling` of a config.json. Raises UserError for a rule that we do not compute, or that lacks a
    number."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return ()
    read = {"llama3": _llama3, "linear": _linear, "yarn": _yarn}.get(kind)
    if read is None:
        raise UserError(f"config.json: rope type {kind!r} is not supported, only default, linear, llama3 and yarn")
    try:
        scaling = read(rope, config)
        rule_of(scaling)
    except KeyError as error:
        raise UserError(f"config.json: rope type {kind!r} needs {error.args[0]!r}") from None
    except (TypeError, ValueError):
        raise UserError(f"config.json: rope type {kind!r} has numbers that do not fit: {dict(rope)}") from None
    return scaling


def _linear(rope: Mapping[str, Any], config: Mapping[str, Any]) -> tuple:
    return ("linear", *Linear(float(rope["factor"])))


def _llama3(rope: Mapping[str, Any], config: Mapping[str, Any]) -> tuple:
    return tuple(float(rope[key]) for key in LLAMA3)


def _yarn(rope: Mapping[str, Any], config: Mapping[str, Any]) -> tuple:
    """What is left out means what it means to transformers: the trained length is max_position_embeddings, a factor of
    null the ratio of the two. Numbers at the end that are Yarn's defaults are left off, as a person would."""
    longest = config.get("max_position_embeddings")
    length = rope.get("original_max_position_embeddings") or longest
    if length is None:
        raise KeyError("original_max_position_embeddings")
    factor = longest / length if rope["factor"] is None else rope["factor"]
    attention = rope.get("attention_factor")
    if attention is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        attention = _mscale(factor, rope["mscale"]) / _mscale(factor, rope["mscale_all_dim"])
    rule = Yarn(
        float(factor), float(length), float(rope.get("beta_fast") or 32), float(rope.get("beta_slow") or 1),
        None if attention is None else float(attention), bool(rope.get("truncate", True)),
    )  # fmt: skip
    numbers = list(rule)
    while len(numbers) > 2 and numbers[-1] == Yarn(1.0, 1.0)[len(numbers) - 1]:
        numbers.pop()
    return ("yarn", *numbers)


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def scaling_to_hf(scaling: tuple) -> dict[str, Any] | None:
    """The value of `rope_scaling` that scaling_from_hf reads as this."""
    rule = rule_of(scaling)
    if rule is None:
        return None
    if isinstance(rule, Linear):
        return dict(rope_type="linear", factor=rule.factor)
    if isinstance(rule, Llama3):
        return dict(rope_type="llama3") | dict(zip(LLAMA3, (*rule[:3], int(rule.trained_length)), strict=True))
    keys = dict(
        rope_type="yarn",
        factor=rule.factor,
        original_max_position_embeddings=int(rule.trained_length),
        beta_fast=rule.fast,
        beta_slow=rule.slow,
    )
    keys |= {} if rule.attention is None else dict(attention_factor=rule.attention)
    return keys | ({} if rule.truncate else dict(truncate=False))
