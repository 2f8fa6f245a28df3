"""Logical axis -> mesh axis: one table says how every array of the program lies on the devices.

Modules name the axes of their parameters ("embed", "expert", ...) and never a mesh axis. The rules below map names to the mesh
axes `data`, `fsdp`, `expert`, `tensor`; XLA's partitioner inserts the collectives. A mesh axis of size 1 costs nothing, so one
table serves a laptop and a pod.
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gspo.types import UserError

MESH_AXES = ("data", "fsdp", "expert", "tensor")

# Logical name -> the mesh axes it is cut along. Rows are cut along every axis that does not cut a weight in the same matmul.
RULES: dict[str, tuple[str, ...]] = {
    "rows": ("data", "fsdp", "expert"),
    "layers": (),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_width": (),
    "mlp": ("tensor",),
    "expert": ("expert",),
    "norm": (),
}


def make_mesh(sizes: Mapping[str, int], devices: list[jax.Device] | None = None) -> Mesh:
    """Mesh over MESH_AXES. sizes: axis -> devices along it, default 1; one axis may be -1, "the rest". Sizes without a -1 take the
    first devices and may leave others idle, in a run of one process: across processes each must own a part of the mesh.

    Raises UserError where there are too few devices, or a -1 does not come out even.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = [int(sizes.get(axis, 1)) for axis in MESH_AXES]
    if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        raise UserError(f"mesh: sizes {dict(zip(MESH_AXES, shape, strict=True))} are not valid; use positive sizes and at most one -1")
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
    # Auto said explicitly: recent versions of make_mesh default to Explicit, where every array type carries its sharding.
    return jax.make_mesh(tuple(shape), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices)


def parse_sizes(text: str) -> dict[str, int]:
    """ "fsdp=4,tensor=2" -> {"fsdp": 4, "tensor": 2}, for command lines; "" -> {}. Raises UserError."""
    sizes = {}
    for part in text.split(",") if text else []:
        axis, _, size = part.partition("=")
        if axis not in MESH_AXES or not size.removeprefix("-").isdecimal():
            raise UserError(f"mesh: {part!r} is no size; write AXIS=NUMBER with axes {', '.join(MESH_AXES)}")
        sizes[axis] = int(size)
    return sizes


def partition_spec(names: tuple[str | None, ...], rules: Mapping[str, tuple[str, ...]] = RULES) -> PartitionSpec:
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


def named_sharding(mesh: Mesh, *names: str | None) -> NamedSharding:
    """Sharding of an array whose axes carry these logical names; missing trailing axes are replicated."""
    return NamedSharding(mesh, partition_spec(names))


def tree_shardings(mesh: Mesh, boxed_tree: Any) -> Any:
    """Tree of abstract arrays, boxed by `nn.with_partitioning` where they have names -> tree of NamedSharding.

    Boxes are removed. An array without a box (an optimizer's step count, say) is replicated. Raises UserError where an axis does
    not divide, naming the parameter, the axis and its size.
    """

    def one(path, leaf):
        names = leaf.names if isinstance(leaf, nn.Partitioned) else ()
        shape = leaf.value.shape if isinstance(leaf, nn.Partitioned) else leaf.shape
        for name, size in zip(names, shape, strict=False):
            parts = math.prod(mesh.shape[axis] for axis in RULES[name]) if name else 1
            if size % parts:
                raise UserError(
                    f"mesh: axis {name!r} of {jax.tree_util.keystr(path)} has {size} entries, which {parts} devices "
                    f"(mesh axes {', '.join(RULES[name])}) do not divide; choose a divisor of {size}"
                )
        return named_sharding(mesh, *names)

    return jax.tree_util.tree_map_with_path(one, boxed_tree, is_leaf=lambda x: isinstance(x, nn.Partitioned))
