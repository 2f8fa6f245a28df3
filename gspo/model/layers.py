"""Blocks one after the other: parameters stacked by layer, run as a loop over them or unrolled.

A model whose blocks are all alike has one stack, "blocks". Where some layers of a Mixture of Experts are dense, they
have a stack of their own, "dense_blocks", and the layers run in stretches of one stack each. Routes and logits of
routers, [L, ...], are then those of the layers that have a router, in their order.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from gspo.model.cache import Caches
from gspo.model.spec import ModelSpec
from gspo.types import Params

# (parameters of a block, x_BTD, given_BTX, cache, place of the layer in it, layer) -> (x_BTD, what it keeps, free_BTX,
# logits_BTE); the last two are None for a dense block
Run = Callable[..., tuple]


class Stretch(NamedTuple):
    """Neighbouring layers of one stack: `size` of them from entry `start` of the stack on; the first is layer
    `first`."""

    stack: str
    start: int
    size: int
    first: int


def stretches(spec: ModelSpec) -> tuple[Stretch, ...]:
    """All layers of a model in their order."""
    found: list[Stretch] = []
    used = {"blocks": 0, "dense_blocks": 0}
    for layer in range(spec.num_layers):
        stack = spec.stack_of(layer)
        if found and found[-1].stack == stack:
            found[-1] = found[-1]._replace(size=found[-1].size + 1)
        else:
            found.append(Stretch(stack, used[stack], 1, layer))
        used[stack] += 1
    return tuple(found)


def layers_of(params: Params, spec: ModelSpec) -> tuple[Params, ...]:
    """A model's parameters -> one tree for each block, in the order of the layers. By a split, whose transpose is a
    concatenation: indexing would give each layer's gradient as a stack of zeros, and add these up."""
    parts = stretches(spec)
    cut = {part.stack: _split(params[part.stack]) for part in parts}
    return tuple(cut[part.stack][part.start + i] for part in parts for i in range(part.size))


def _split(stacked: Params) -> tuple[Params, ...]:
    size = jax.tree.leaves(stacked)[0].shape[0]
    cut = jax.tree.map(lambda x: [part[0] for part in jax.lax.split(x, (1,) * size)], stacked)
    outer, inner = jax.tree.structure(stacked), jax.tree.structure([0] * size)
    return tuple(jax.tree.transpose(outer, inner, cut))


def scanned(runs: Mapping[str, Run], params: Params, spec: ModelSpec, x_BTD, routes_LBTX, caches: Caches | None):
    """Each stretch as a loop: one compilation of a block, whatever their number. One cache holds all layers. runs: how
    a block of each stack runs. Returns (x_BTD, what the layers keep, stacked or one cache, free_LBTX, logits_LBTE)."""
    cache, kept, routers = caches[0] if caches else None, [], []
    for part in stretches(spec):

        def body(carry, layer, run=runs[part.stack]):
            x_BTD, cache = carry
            params, given_BTX, index = layer
            x_BTD, kept, free_BTX, logits_BTE = run(params, x_BTD, given_BTX, cache, index, index)
            if cache is not None:
                cache, kept = kept, None
            return (x_BTD, cache), (kept, free_BTX, logits_BTE)

        stack, given = _cut(params[part.stack], part), None
        if routes_LBTX is not None and part.stack == "blocks":
            given = _cut(routes_LBTX, part)
        index_L = part.first + jnp.arange(part.size)
        (x_BTD, cache), (keep, *router) = jax.lax.scan(body, (x_BTD, cache), (stack, given, index_L))
        kept.append(keep)
        routers += [router] if part.stack == "blocks" else []
    free, logits = (_joined(list(x)) for x in zip(*routers, strict=True))
    return x_BTD, (cache,) if caches else _joined(kept), free, logits


def _cut(stacked: Params, part: Stretch) -> Params:
    """The layers of a stretch; the whole stack as it is."""
    whole = jax.tree.leaves(stacked)[0].shape[0] == part.size
    return stacked if whole else jax.tree.map(lambda x: x[part.start : part.start + part.size], stacked)


def _joined(parts: list) -> chex.ArrayTree:
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)


def unrolled(runs: Mapping[str, Run], layers: tuple[Params, ...], spec: ModelSpec, x_BTD, routes_LBTX, caches):
    """Layer after layer: nothing is copied into stacks, and each layer's cache is updated where it lies. layers: as
    `layers_of` gives them. Returns as `scanned`, but for caches layer by layer."""
    kept, routers = [], []
    for i, params in enumerate(layers):
        stack, given_BTX = spec.stack_of(i), None
        if routes_LBTX is not None and stack == "blocks":
            given_BTX = routes_LBTX[len(routers)]
        x_BTD, keep, *router = runs[stack](params, x_BTD, given_BTX, caches[i] if caches else None, 0, i)
        kept.append(keep)
        routers += [router] if stack == "blocks" else []
    free, logits = (None if x[0] is None else jnp.stack(x) for x in zip(*routers, strict=True))
    return x_BTD, tuple(kept), free, logits
