"""Logical axis -> mesh axis: one table says how every array of the program lies on the devices.

Modules name the axes of their arrays ("embed", "expert", ...) and never a mesh axis. A table of RULES maps these names
to the mesh axes `data`, `fsdp`, `expert`, `tensor`; XLA's partitioner inserts the collectives. A mesh axis of size 1
costs nothing, so the fullest table, "tensor", serves a laptop and a pod. The others leave weights whole that it cuts: a
rollout reads every weight for every token, and may want them all at hand (`rollout_mesh_rules`).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gspo.types import UserError, map_arrays

MESH_AXES = ("data", "fsdp", "expert", "tensor")
DISPATCHES = ("all_gather", "all_to_all")  # how tokens come to experts on other devices; see gspo.model.dispatch

# Name of the table -> logical name -> the mesh axes it is cut along. Rows are cut along every axis that does not cut a
# weight inside a matmul. An axis of weights that is cut along an axis of rows (FSDP) is gathered before use. The model
# width is "embed", and "expert_embed" in the weights of experts, where the mesh axis `expert` is already taken.
_WHOLE: dict[str, tuple[str, ...]] = {
    "rows": ("data", "fsdp", "expert"),
    "layers": (), "vocab": (), "embed": (), "expert_embed": (), "heads": (), "kv_heads": (), "head_width": (),
    "mlp": (),
    "expert": (), "norm": (),
}  # fmt: skip
_FSDP = _WHOLE | {"embed": ("fsdp", "expert"), "expert_embed": ("fsdp", "expert")}
_EXPERT_FSDP = _FSDP | {"expert": ("expert",), "expert_embed": ("fsdp",)}
RULES: dict[str, dict[str, tuple[str, ...]]] = {
    "single": _WHOLE,  # every weight whole on every device: one device, or data parallelism
    "fsdp": _FSDP,  # every weight cut along the model width
    "expert": _WHOLE
    | {"expert": ("fsdp", "expert")},  # experts spread over all they can be, everything else whole: for rollouts
    "expert_fsdp": _EXPERT_FSDP,  # experts along `expert`, and every weight along the model width as far as it goes
    "tensor": _EXPERT_FSDP
    | dict.fromkeys(("vocab", "heads", "kv_heads", "mlp"), ("tensor",)),  # and heads, widths, vocabulary too
}


def make_mesh(sizes: Mapping[str, int], devices: list[jax.Device] | None = None) -> Mesh:
    """Mesh over MESH_AXES. sizes: axis -> devices along it, default 1; one axis may be -1, "the rest". Sizes without a
    -1 take the first devices and may leave others idle, in a run of one process: across processes each must own a part
    of the mesh.

    Raises UserError where there are too few devices, or a -1 does not come out even.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = [int(sizes.get(axis, 1)) for axis in MESH_AXES]
    if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        raise UserError(
            f"mesh: sizes {dict(zip(MESH_AXES, shape, strict=True))} are not valid; use positive sizes and at most "
            "one -1"
        )
    known = math.prod(size for size in shape if size != -1)
    if -1 not in shape:
        devices = devices[:known] if jax.process_count() == 1 else devices
    elif len(devices) % known == 0:
        shape[shape.index(-1)] = len(devices) // known
    if math.prod(shape) != len(devices):
        raise UserError(
            f"mesh: {' x '.join(f'{a}={s}' for a, s in zip(MESH_AXES, shape, strict=True))} needs {known} devices "
            f"(or a multiple, with a -1), but there are {len(devices)}; set one axis to -1 to take the rest"
        )
    # On a TPU the axes are laid along the torus; one axis of the torus may be shared by two of the mesh (4x4x4 as 8 x
    # 8).
    placed = mesh_utils.create_device_mesh(tuple(shape), devices, allow_split_physical_axes=True)
    # Auto said explicitly: recent versions default to Explicit, where every array type carries its sharding.
    return Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def parse_sizes(text: str) -> dict[str, int]:
    """ "fsdp=4,tensor=2" -> {"fsdp": 4, "tensor": 2}, for command lines; "" -> {}. Raises UserError."""
    sizes = {}
    for part in text.split(",") if text else []:
        axis, _, size = part.partition("=")
        if axis not in MESH_AXES or not size.removeprefix("-").isdecimal():
            raise UserError(f"mesh: {part!r} is no size; write AXIS=NUMBER with axes {', '.join(MESH_AXES)}")
        sizes[axis] = int(size)
    return sizes


def partition_spec(names: tuple[str | None, ...], rules: Mapping[str, tuple[str, ...]]) -> PartitionSpec:
    """Logical names of an array's axes -> PartitionSpec. Raises ValueError where two axes claim the same mesh axis."""
    taken: dict[str, str] = {}
    entries = []
    for name in names:
        axes = rules[name] if name is not None else ()
        for axis in axes:
            if axis in taken:
                raise ValueError(f"axes {taken[axis]!r} and {name!r} of {names} both map to mesh axis {axis!r}")
            taken[axis] = str(name)
        entries.append(axes[0] if len(axes) == 1 else (axes or None))
    return PartitionSpec(*entries)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and a table of RULES: where every array of a program lies. Hashable, so that a linen module may hold one.
    Without a mesh (ONE_DEVICE) and on a mesh of one device, everything that lays an array out is the identity.

    Raises UserError for a table that does not exist, and for one that leaves devices without work of their own.
    """

    mesh: Mesh | None = None
    rules: str = "tensor"
    dispatch: str = "all_gather"

    def __post_init__(self):
        if self.rules not in RULES:
            raise UserError(f"mesh_rules={self.rules!r}: choose one of {', '.join(RULES)}")
        if self.dispatch not in DISPATCHES:
            raise UserError(f"expert_dispatch={self.dispatch!r}: choose one of {', '.join(DISPATCHES)}")
        sizes = self.mesh.shape if self.several else {}
        idle = [
            axis for axis, size in sizes.items() if size > 1 and not any(axis in axes for axes in self.table.values())
        ]
        if idle:
            fitting = [name for name, table in RULES.items() if any(idle[0] in axes for axes in table.values())]
            raise UserError(
                f"mesh.{idle[0]}={self.mesh.shape[idle[0]]}: the rules {self.rules!r} cut nothing along it; "
                f"use mesh_rules={' or '.join(map(repr, fitting))}, or another axis"
            )

    @property
    def several(self) -> bool:
        """Whether there is more than one device."""
        return self.mesh is not None and self.mesh.size > 1

    @property
    def table(self) -> dict[str, tuple[str, ...]]:
        return RULES[self.rules]

    def axes(self, name: str) -> tuple[str, ...]:
        """The mesh axes of more than one device along which `name` is cut."""
        return tuple(axis for axis in self.table[name] if self.several and self.mesh.shape[axis] > 1)

    def parts(self, name: str) -> int:
        """Number of pieces that an axis of this name is cut into."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes(name))

    def spec(self, *names: str | None) -> PartitionSpec:
        return partition_spec(names, self.table)

    def sharding(self, *names: str | None) -> NamedSharding:
        """Sharding of an array whose axes carry these logical names; missing trailing axes are replicated."""
        return NamedSharding(self.mesh, self.spec(*names))

    def constrain(self, x: jax.Array, *names: str | None) -> jax.Array:
        """x, inside jit, laid out by the names of its axes."""
        return jax.lax.with_sharding_constraint(x, self.sharding(*names)) if self.several else x

    def gathered(self, weight: jax.Array, *names: str | None) -> jax.Array:
        """A weight as a matmul with rows needs it: whole along every mesh axis that cuts rows. Under autodiff its
        gradient is scattered back. Without it the partitioner may well move the activations instead."""
        cut = {axis for name in names if name for axis in self.axes(name)}
        order = [axis for axis in self.axes("rows") if axis in cut]
        for kept in (order[:i] for i in reversed(range(len(order)))):  # axis by axis: see `gather_axes`
            table = {
                name: tuple(axis for axis in axes if axis in kept or axis not in order)
                for name, axes in self.table.items()
            }
            weight = jax.lax.with_sharding_constraint(weight, NamedSharding(self.mesh, partition_spec(names, table)))
        return weight

    def lookup(self, table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        """Rows of a table that is cut along ("vocab", "embed"), [B, T, D], cut along their rows.

        Each device looks its part of the width up for the tokens of all that share the table with it, and the parts are
        exchanged (all-to-all): that moves B T D numbers, and the gradient of the table stays where the table lies.
        Gathering it moves V D."""
        embed = self.table["embed"]
        if not (self.several and embed):
            return self.constrain(jnp.take(table_VD, tokens_BT, axis=0), "rows", None, None)
        rows_only = tuple(axis for axis in self.table["rows"] if axis not in embed)
        tokens_BT = jax.lax.with_sharding_constraint(tokens_BT, NamedSharding(self.mesh, PartitionSpec(rows_only)))
        by_width = NamedSharding(self.mesh, PartitionSpec(rows_only, None, embed))
        x_BTD = jax.lax.with_sharding_constraint(jnp.take(table_VD, tokens_BT, axis=0), by_width)
        return self.constrain(x_BTD, "rows", None, None)

    def of_dims(self, dims: str) -> NamedSharding:
        """Sharding of an array with these dimensions, letters of the key in `gspo.types`: rows (B, Q) and key/value
        heads (K) are cut, the rest is whole, "LBTX" as (None, rows, None, None) say. "": a scalar."""
        return self.sharding(*(_OF_DIMENSION.get(letter) for letter in dims))

    def map_fields(self, function: Callable[[Any, NamedSharding], Any], record: Any) -> Any:
        """function(array, sharding) on every array of a record, each with the sharding of the dimensions that its field
        declares (`gspo.types.array`)."""
        return map_arrays(lambda dims, x: function(x, self.of_dims(dims)), record)

    def constrain_fields(self, record: Any) -> Any:
        """A record, inside jit, laid out by the dimensions of its fields."""
        return self.map_fields(jax.lax.with_sharding_constraint, record) if self.several else record


ONE_DEVICE = Layout()


def gather_axes(x: jax.Array, axes: tuple[str, ...], dim: int) -> jax.Array:
    """Inside shard_map: x gathered along dimension `dim`, cut along these mesh axes. One axis after the other: of a
    gather over all devices at once XLA makes an all-reduce of arrays that are zero but for a small part, which moves
    twice the bytes."""
    for axis in reversed(axes):
        x = jax.lax.all_gather(x, axis, axis=dim, tiled=True)
    return x


_OF_DIMENSION = {"B": "rows", "Q": "rows", "K": "kv_heads"}


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """A tree of shapes and dtypes and one of shardings -> ShapeDtypeStructs with both: what checkpoints and imports
    fill."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def tree_shardings(layout: Layout, boxed_tree: Any) -> Any:
    """Tree of abstract arrays, boxed by `nn.with_partitioning` where they have names -> tree of NamedSharding.

    Boxes are removed. An array without a box (an optimizer's step count, say) is replicated. Raises UserError where an
    axis does not divide, naming the parameter, the axis and its size.
    """

    def one(path, leaf):
        names = leaf.names if isinstance(leaf, nn.Partitioned) else ()
        shape = leaf.value.shape if isinstance(leaf, nn.Partitioned) else leaf.shape
        for name, size in zip(names, shape, strict=False):
            if name and size % layout.parts(name):
                raise UserError(indivisible(layout, name, jax.tree_util.keystr(path), size))
        return layout.sharding(*names)

    return jax.tree_util.tree_map_with_path(one, boxed_tree, is_leaf=lambda x: isinstance(x, nn.Partitioned))


def indivisible(layout: Layout, name: str, where: str, size: int) -> str:
    """Message: axis `name`, of `size` entries in `where`, does not come out even."""
    sizes = " x ".join(f"mesh.{axis}={layout.mesh.shape[axis]}" for axis in layout.axes(name))
    choices = (
        ", ".join(str(d) for d in range(1, size + 1) if size % d == 0) if size <= 256 else f"the divisors of {size}"
    )
    return (
        f"{sizes}: cannot cut axis {name!r} of {where}, {size} entries, into {layout.parts(name)} equal parts; choose "
        f"from {choices}"
    )
