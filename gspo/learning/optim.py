"""AdamW with global-norm clipping, and the learning rate as a function of the update."""

import dataclasses
import difflib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gspo.types import Params, UserError

SCHEDULES = {  # fraction of the decay that is done, in [0, 1] -> factor on the learning rate
    "constant": lambda done: jnp.ones_like(done),
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.5 * (1 + jnp.cos(jnp.pi * done)),
}
NOT_DECAYED = ("scale", "bias")


def make_schedule(*, learning_rate: float, schedule: str = "constant", warmup_steps: int = 0,
                  total_steps: int | None = None) -> Callable[[Any], jax.Array]:  # fmt: skip
    """learning_rate_at(step): float32 learning rate of optimizer update `step` (0-based), for the optimizer and for the
    metrics.

    Warm-up: learning_rate * (step + 1) / warmup_steps for the first `warmup_steps` updates, so that none of them is
    lost to a rate of zero. Then the schedule, which reaches zero at update `total_steps`, the first one that is not
    made. Raises: UserError on an unknown schedule, a negative rate, or steps that leave no room for the decay.
    """
    if schedule not in SCHEDULES:
        near = difflib.get_close_matches(str(schedule), SCHEDULES, n=1, cutoff=0.0)[0]
        raise UserError(f"schedule={schedule!r} is unknown: did you mean {near!r}? There are {', '.join(SCHEDULES)}")
    if not learning_rate >= 0:
        raise UserError(f"learning_rate={learning_rate} must be zero or more")
    if warmup_steps < 0 or (schedule != "constant" and (total_steps is None or warmup_steps >= total_steps)):
        raise UserError(f"schedule={schedule!r} decays between warmup_steps={warmup_steps} and "
                        f"total_steps={total_steps}: "
                        "the second must be the larger")  # fmt: skip
    factor = SCHEDULES[schedule]
    decay_steps = max((total_steps or 0) - warmup_steps, 1)

    def learning_rate_at(step: Any) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        warm = jnp.minimum((step + 1) / max(warmup_steps, 1), 1.0)
        return learning_rate * warm * factor(jnp.clip((step - warmup_steps) / decay_steps, 0.0, 1.0))

    return learning_rate_at


def decays(params: Params) -> Any:
    """Tree of bools: True where weight decay applies, which is everywhere but on leaves named "scale" and "bias".

    By name, because the layers are stacked for the scan: the scale of a norm is [L, D] there, a matrix by its shape.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: _name(path) not in NOT_DECAYED, params)


def read_lr_scale(text: str) -> tuple[tuple[str, float], ...]:
    """ "router=20, attention/query=0" -> (("router", 20.0), ("attention/query", 0.0)). Raises: UserError."""
    pairs = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        pattern, equals, number = (piece.strip() for piece in part.rpartition("="))
        try:
            re.compile(pattern)
            factor = float(number)
        except (re.error, ValueError):
            factor = float("nan")
        if not (pattern and equals and 0 <= factor < float("inf")):
            raise UserError(
                f"lr_scale={text!r}: {part!r} is not PATTERN=FACTOR, such as router=20, with a regular expression for "
                "names of parameters and a factor of zero or more"
            )
        pairs.append((pattern, factor))
    return tuple(pairs)


def lr_factors(scales: tuple[tuple[str, float], ...], params: Params) -> Any:
    """Tree of floats: the factor of the first pattern that is found in a parameter's name ("blocks/moe/router"), else
    1. Raises: UserError where a pattern is found in none."""
    names = jax.tree_util.tree_map_with_path(lambda path, _: "/".join(str(entry.key) for entry in path), params)
    known = jax.tree.leaves(names)
    for pattern, _ in scales:
        if not any(re.search(pattern, name) for name in known):
            raise UserError(f"lr_scale: {pattern!r} is in the name of no parameter; there are {', '.join(known)}")
    return jax.tree.map(lambda name: next((f for pattern, f in scales if re.search(pattern, name)), 1.0), names)


def _name(path: Any) -> str:
    return next((entry.key for entry in reversed(path) if isinstance(entry, jax.tree_util.DictKey)), "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW:
    """What Adam does with a gradient, whatever the learning rate. Raises: UserError.

    max_grad_norm  gradients are scaled down to this global L2 norm before Adam sees them; None: they are not
    lr_scale       learning rate of some parameters over that of the rest, by patterns of their names, "router=20"; 0
                   freezes them, and keeps them out of the norm
    The others as in `optax.adamw`.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    lr_scale: str = ""

    def __post_init__(self):
        for name, limit in (("beta1", 1), ("beta2", 1), ("weight_decay", float("inf"))):
            if not 0 <= getattr(self, name) < limit:
                raise UserError(f"{name}={getattr(self, name)} must lie in [0, {limit})")
        if not self.eps > 0 or (self.max_grad_norm is not None and not self.max_grad_norm > 0):
            raise UserError(
                f"eps={self.eps} and max_grad_norm={self.max_grad_norm} must be positive (max_grad_norm=None: no "
                "clipping)"
            )
        read_lr_scale(self.lr_scale)


def make_optimizer(
    *,
    learning_rate: float,
    schedule: str = "constant",
    warmup_steps: int = 0,
    total_steps: int | None = None,
    **adam: float | None,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019, with the decay multiplied by the learning rate, as in optax and PyTorch).

    adam: the fields of `AdamW`. The others as in `make_schedule`. Raises: UserError.
    """
    by = AdamW(**adam)
    learning_rate_at = make_schedule(
        learning_rate=learning_rate, schedule=schedule, warmup_steps=warmup_steps, total_steps=total_steps
    )
    clip = optax.identity() if by.max_grad_norm is None else optax.clip_by_global_norm(by.max_grad_norm)
    chain = [
        clip,
        optax.scale_by_adam(by.beta1, by.beta2, by.eps),
        optax.add_decayed_weights(by.weight_decay, decays),
        optax.scale_by_learning_rate(learning_rate_at),
    ]
    scales = read_lr_scale(by.lr_scale)
    if scales:
        frozen = lambda params: jax.tree.map(lambda factor: factor == 0, lr_factors(scales, params))  # noqa: E731
        chain.insert(0, optax.masked(optax.set_to_zero(), frozen))
        chain.append(
            optax.stateless(lambda updates, params: jax.tree.map(jnp.multiply, updates, lr_factors(scales, updates)))
        )
    return optax.chain(*chain)
