"""Mismatch injection: samplers that differ from the learner on purpose.

In large systems the sampler is another program: other kernels, lower precision, parameters a few versions old. On one
machine with one program it is not, and neither its harm nor the cures (routing replay R3, `sampler_is`) can be seen. So
it may be made to differ:

    params          the sampler's parameters rounded to bfloat16, or to int8 with one scale per output column
    router_noise    Gaussian noise on its router logits
    expert_swap     the last expert of a token swapped for another, at a rate
    stale_rollouts  its parameters are those of that many rollouts ago

The two in the middle belong to the model (`Transformer.router_noise`, `router_swap`), the last to the loop.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from gspo.learning.optim import decays
from gspo.model.adapters import merged_params
from gspo.types import Params


def to_bfloat16(x: jax.Array) -> jax.Array:
    """Rounded to bfloat16, kept in its own dtype."""
    return x.astype(jnp.bfloat16).astype(x.dtype)


def to_int8(x: jax.Array) -> jax.Array:
    """Rounded to 255 levels between ± the largest entry of each output column."""
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-2, keepdims=True), 1e-12) / 127
    return jnp.round(x / scale) * scale


ROUNDINGS = {"float32": lambda x: x, "bfloat16": to_bfloat16, "int8": to_int8}
MATRICES_ALONE = ("int8",)  # scales of norms and biases, which are matrices only by their layers, stay as they are


def make_rounding(kind: str, adapter_scale: float | None = None) -> Callable[[Params], Params]:
    """Returns the jitted map from the learner's parameters to the sampler's; the identity for "float32". adapter_scale:
    of adapters that are merged first, where there are any."""
    if kind == "float32":
        return lambda params: params
    rounded = ROUNDINGS[kind]

    @jax.jit
    def sampled(params: Params) -> Params:
        params = merged_params(params, adapter_scale)
        matrix = decays(params)
        return jax.tree.map(lambda x, m: rounded(x) if m or kind not in MATRICES_ALONE else x, params, matrix)

    return sampled
