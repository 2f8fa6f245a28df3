"""The trees that a run holds: how large they are on each device, and how those that nothing trains are kept between
their uses, in half the bytes or in the memory of the host.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gspo.checks import need, one_of
from gspo.learning.sampler import in_compute_dtype
from gspo.learning.state import Start
from gspo.run.disk import readable
from gspo.types import Params, TrainState

HOST = "pinned_host"  # the kind of memory that devices copy from and to directly
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Storage:
    """How a frozen tree is kept between uses. Arithmetic is as ever: what is kept in bfloat16 is read as float32, so
    that rounded weights are all that differs (routers, scales and biases are not rounded).

    field    what the names of the fields begin with, for errors: "ref_"
    dtype    float32 | bfloat16
    offload  whether it lies in the host's memory; it is copied to the devices for each use
    """

    field: str
    dtype: str = "float32"
    offload: bool = False

    def __post_init__(self):
        one_of(f"{self.field}dtype", self.dtype, DTYPES)

    @property
    def plain(self) -> bool:
        return self.dtype == "float32" and not self.offload

    def abstract(self, params: Params) -> Params:
        """Abstract parameters with shardings -> the same as they are kept. Raises UserError where devices cannot reach
        such memory of the host."""
        if self.plain:
            return params
        rounded = jax.eval_shape(self._rounded, params)
        return jax.tree.map(
            lambda x, was: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._place(was.sharding)), rounded, params
        )

    def kept(self, params: Params) -> Params:
        if self.plain:
            return params
        places = jax.tree.map(lambda x: self._place(x.sharding), params)
        rounded = jax.jit(self._rounded)(params) if self.dtype != "float32" else params
        return jax.device_put(rounded, places) if self.offload else rounded

    def fetched(self, params: Params) -> Params:
        """What was kept, as the model reads it: float32, on the devices."""
        if self.offload:
            params = jax.device_put(params, jax.tree.map(lambda x: _on_device(x.sharding), params))
        return params if self.dtype == "float32" else _float32(params)

    def _rounded(self, params: Params) -> Params:
        return in_compute_dtype(params, jnp.dtype(self.dtype))

    def _place(self, sharding: Any) -> Any:
        if not self.offload:
            return sharding
        device = next(iter(sharding.device_set))
        kinds = [memory.kind for memory in device.addressable_memories()]
        need(HOST in kinds, f"{self.field}offload", True,
             f"{device.platform} devices know no {HOST} memory, only {', '.join(kinds)}; set it to False")  # fmt: skip
        return sharding.with_memory_kind(HOST)


_float32 = jax.jit(lambda params: jax.tree.map(lambda x: x.astype(jnp.float32), params))


def _on_device(sharding: Any) -> Any:
    device = next(iter(sharding.device_set))
    return sharding.with_memory_kind(device.default_memory().kind)


@dataclasses.dataclass(frozen=True)
class ReferencePlan:
    """When and how far the reference policy follows, never where sync_steps is 0; and how it is kept."""

    sync_steps: int = 0  # rollouts
    mixup_alpha: float = 1.0
    storage: Storage = Storage("ref_")

    def __post_init__(self):
        need(0 < self.mixup_alpha <= 1, "ref_model_mixup_alpha", self.mixup_alpha, "must be in (0, 1]")


def keep_reference(start: Start, storage: Storage) -> Start:
    """The start of a state whose reference is kept so."""
    if storage.plain or start.abstract.ref_params is None:
        return start
    kept = lambda state: state.replace(ref_params=storage.kept(state.ref_params))  # noqa: E731
    return start._replace(
        init=lambda key: kept(start.init(key)),
        begin=lambda params, key: kept(start.begin(params, key)),
        abstract=start.abstract.replace(ref_params=storage.abstract(start.abstract.ref_params)),
    )


# ---------------------------------------------------------------------------- what they take


def bytes_per_device(tree: Any) -> int:
    """Of arrays, or abstract ones with shardings; those in the host's memory included."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def trees_of(state: TrainState, trained: str = "policy") -> dict[str, Any]:
    """Name -> tree, of all that a state holds, abstract or not. trained: what its parameters are."""
    critic = state.critic
    found = {
        trained if state.frozen is None else "adapters": state.params,
        "weights under them": state.frozen,
        "optimizer": state.opt_state,
        "reference": state.ref_params,
        "stale copies": state.stale_params,
        "critic": critic and critic.params,
        "critic's optimizer": critic and critic.opt_state,
    }
    return {name: tree for name, tree in found.items() if jax.tree.leaves(tree)}


def describe_trees(trees: Mapping[str, Any]) -> list[str]:
    """Lines for the log: each tree, its dtypes and its bytes on each device, and their sum."""
    rows, total = [], 0
    for name, tree in trees.items():
        leaves, size = jax.tree.leaves(tree), bytes_per_device(tree)
        dtypes = sorted({x.dtype.name for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)})
        on_host = all(x.sharding.memory_kind == HOST for x in leaves)
        total += 0 if on_host else size
        rows.append((name, ", ".join(dtypes), readable(size) + " of the host's memory" * on_host))
    rows.append(("together", "", readable(total)))
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    return ["held on each device:"] + [
        f"  {name:<{widths[0]}}  {dtypes:<{widths[1]}}  {size}" for name, dtypes, size in rows
    ]
