"""Collectives of a compiled program: what they move, among how many devices, and whose values these are."""

import math
import re
from typing import NamedTuple

from gspo.report.hlo import Computation, Instruction, numbers

COLLECTIVES = {"all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ragged-all-to-all", "collective-permute"}
COLLECTIVES |= {"collective-broadcast"}
GATHERING = {"all-gather", "all-reduce", "collective-broadcast"}  # after which a device may hold what others had


class Collective(NamedTuple):
    """One collective instruction: how much it moves at a time and how often.

    bytes: size on one device of the larger side, for one execution: the operand of an all-reduce and a reduce-scatter,
    the result otherwise; but of the smaller one for a ragged all-to-all, whose other side is made for the worst case.
    shape: as "bf16[16,2048]"; several arrays that move together as "f32[16], f32[32]".
    origins: for each of these arrays, the arguments of the program that it holds elements of; () where not looked for.
    """

    kind: str
    bytes: int
    count: int
    group_size: int
    shape: str
    op_name: str
    origins: tuple[frozenset[str], ...] = ()


def by_kind(collectives: tuple[Collective, ...]) -> dict[str, tuple[int, int]]:
    """kind -> (executions, bytes of all of them), most bytes first."""
    totals: dict[str, tuple[int, int]] = {}
    for c in collectives:
        count, size = totals.get(c.kind, (0, 0))
        totals[c.kind] = (count + c.count, size + c.count * c.bytes)
    return dict(sorted(totals.items(), key=lambda item: -item[1][1]))


# ---- Participants ----


def group_size(attributes: str, devices: int) -> int:
    """Devices that take part in one group, from the three ways to write groups; of a permutation, all devices in its
    pairs."""
    if pairs := numbers(r"source_target_pairs=\{(.*?\})\}", attributes):
        return len(set(pairs))
    if listed := numbers(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(listed)
    if shape := numbers(r"replica_groups=\[([\d,]*)\]<=", attributes):
        return shape[-1]
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        # An axis stands for its size; 'axis':(2)4 is a part of it, of size 4.
        return math.prod(int(part or sizes[axis]) for axis, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2]))
    return devices  # replica_groups={}: everybody


def is_continued(ins: Instruction, scope: Computation) -> bool:
    """Whether a collective is a later link of one that is counted where it starts.

    A TPU compiler spreads a collective over fusions: one with AsyncCollectiveStart, some that compute something else
    meanwhile, one with AsyncCollectiveDone. The instruction stands in each of them, with the number of its chain.
    """
    is_link = "chain_id=" in ins.attributes
    return is_link and not any('"AsyncCollectiveStart"' in other.attributes for other in scope.instructions.values())
