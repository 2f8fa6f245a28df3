"""Low-rank adapters (LoRA, 2106.09685 §4.1): a matrix W of a layer is used as W + (α / r) A B, and only A [in, r] and
B [r, out] are trained.

A model with adapters is applied to the tree of its base with one more entry, params["blocks"]["lora"]: the A and B of
each adapted matrix under the matrix's own path, stacked as it is, [L, in, r] or [L, E, in, r]. `attached` puts the two
together and copies nothing.

A block adds the product to its matrices when it runs (`merged_block`): attention, experts and their dispatch know
nothing of adapters, and the gradient of a whole matrix exists for one layer at a time. The other way, x W + (x A) B,
spares that gradient's product, a third of the matmuls; but in bfloat16 it is another function than the merged matrix
that the sampler reads, whose rounding swallows small adapters, and sampler and learner are to agree.
"""

import dataclasses
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

from gspo.types import LORA, Params, UserError, attached

MERGED = "merged_weight"  # what `jax.checkpoint` knows the sums by


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Which matrices are adapted, and how. targets: regular expressions, separated by commas, that are looked for in
    names such as "blocks/attention/query". Raises UserError."""

    rank: int
    alpha: float
    targets: str

    def __post_init__(self):
        if self.rank < 0:
            raise UserError(f"lora.rank={self.rank}: must be >= 0 (0: no adapters)")
        if not 0 < self.alpha < float("inf"):
            raise UserError(f"lora.alpha={self.alpha}: must be positive")
        for pattern in self.patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"lora.targets: {pattern!r} is no regular expression: {error}") from None
        if not self.patterns:
            raise UserError('lora.targets="": name at least one matrix, such as attention/ (lora.rank=0: no adapters)')

    @property
    def patterns(self) -> tuple[str, ...]:
        return tuple(filter(None, (part.strip() for part in self.targets.split(","))))

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def matrices(self, params: Params) -> dict[str, Any]:
        """{name: leaf} of the matrices that the patterns find in a tree of parameters, of arrays or abstract. A router
        is found only by a pattern that finds nothing else: "moe" are the experts.

        Raises UserError where a pattern finds no matrix of a layer. Norms and embeddings are none, nor are the matrices
        of dense layers among those with experts."""
        named = flatten_dict(params, sep="/")
        known = [name for name, leaf in named.items() if name.startswith("blocks/") and leaf.ndim > 2]  # stacked by L
        chosen: set[str] = set()
        for pattern in self.patterns:
            found = [name for name in known if re.search(pattern, name)]
            found = [name for name in found if not name.endswith("/router")] or found
            if not found:
                other = [name for name in named if re.search(pattern, name)]
                why = f"names {other[0]}, which cannot be adapted" if other else "is in the name of no matrix"
                raise UserError(f"lora.targets: {pattern!r} {why}; there are {', '.join(known)}")
            chosen |= set(found)
        return {name: named[name] for name in known if name in chosen}


# ---------------------------------------------------------------------------------------------------- their trees


def init_adapters(lora: LoRA, params: Params, key: chex.PRNGKey) -> Params:
    """{"blocks": {"attention": {"query": {"A", "B"}}}}, float32. A ~ U(± 1/√in), as PEFT has it (Kaiming's bound with
    a = √5), and B = 0: the policy that the run begins with is the base."""
    adapters = {}
    for index, (name, leaf) in enumerate(lora.matrices(params).items()):
        *stack, width_in, width_out = leaf.shape
        shape, bound = (*stack, width_in, lora.rank), width_in**-0.5
        adapters[f"{name}/A"] = jax.random.uniform(jax.random.fold_in(key, index), shape, jnp.float32, -bound, bound)
        adapters[f"{name}/B"] = jnp.zeros((*stack, lora.rank, width_out), jnp.float32)
    return unflatten_dict(adapters, sep="/")


def abstract_adapters(lora: LoRA, abstract: Params) -> Params:
    """Their shapes, dtypes and shardings, from those of the parameters: the axes that A and B share with a matrix are
    cut as it is, and the rank is whole."""
    shapes = jax.eval_shape(lambda: init_adapters(lora, abstract, jax.random.key(0)))

    def one(path, leaf):
        *names, factor = (entry.key for entry in path)
        sharding = getattr(matrices["/".join(names)], "sharding", None)
        if isinstance(sharding, NamedSharding):
            spec = (*sharding.spec, *(None,) * (leaf.ndim - len(sharding.spec)))
            cut = (*spec[:-1], None) if factor == "A" else (*spec[:-2], None, spec[-1])
            sharding = NamedSharding(sharding.mesh, PartitionSpec(*cut))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    matrices = lora.matrices(abstract)
    return jax.tree_util.tree_map_with_path(one, shapes)


# ---------------------------------------------------------------------------------------------------- their sum


def merged_block(block: Params, scale: float | None) -> Params:
    """W + scale · A B for each adapted matrix of a block, or of all of them, stacked; without the adapters. A block
    that has none stays as it is."""
    if LORA not in block:
        return block
    weights = flatten_dict({name: part for name, part in block.items() if name != LORA})
    adapters = flatten_dict(block[LORA])
    for *path, factor in adapters:
        if factor == "A":
            a, b = (adapters[(*path, name)] for name in "AB")
            # Highest: on accelerators a float32 product has the digits of bfloat16 otherwise.
            product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
            weights[tuple(path)] = checkpoint_name(weights[tuple(path)] + scale * product, MERGED)
    return unflatten_dict(weights)


def merged_params(params: Params, scale: float | None) -> Params:
    """The whole tree of `gspo.types.attached`, merged: parameters as of a model without adapters."""
    return {**params, "blocks": merged_block(params["blocks"], scale)}


def merge_into(weights: Params, adapters: Params, scale: float) -> Params:
    """Arrays of a base, whose buffers it takes, and of its adapters, merged; laid out as the base is."""
    merge = lambda weights, adapters: merged_params(attached(weights, adapters), scale)  # noqa: E731
    shardings = jax.tree.map(lambda x: x.sharding, weights)
    return jax.jit(merge, donate_argnums=0, out_shardings=shardings)(weights, adapters)
