"""What a compiled step costs, read from its HLO text: FLOPs, collectives and the largest arrays, all for one device.

XLA's own cost analysis counts the body of a loop once, and a model is a scan over layers. So the text of the
partitioned program (`compiled.as_text()`) is walked from its entry computation, and what stands in a loop counts as
often as the loop runs.

A TPU program hides most of what is looked for here: a dot is a convolution inside a fusion, its batch dimensions are
spatial ones with a window that meets each element once, a reduce-scatter may be a fusion around an all-reduce, an
all-gather may be spread over several fusions, and a grouped matmul is a kernel or a masked convolution. What is no
matmul there counts as nothing: other kernels (custom calls), and products with a single vector, which become a multiply
and a reduce.
"""

import dataclasses
import math
import re
from typing import NamedTuple

from gspo.report.collectives import COLLECTIVES, GATHERING, Collective, group_size, is_continued
from gspo.report.hlo import Array, Computation, Instruction, arrays_of, parse, place_of, shapes_in, size_of, source
from gspo.report.matmuls import convolution_flops, dot_flops, is_ragged_kernel, masked_groups, ragged_kernel_flops
from gspo.report.origins import Frame, Value, origins

# Results that are other arrays under a new name, or no arrays at all. The -start of a pair is one too: its -done gives
# the result.
ALIASES = {
    "parameter",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "optimization-barrier",
    "domain",
}
ALIASES |= {"add-dependency", "after-all", "async-update"}
KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


class Program(NamedTuple):
    """flops: 2 x multiply-adds per device. unknown_loops: loops whose trips nobody could tell, taken `unknown_trips`
    times. arguments: names of the program's arguments, as jax gave them."""

    flops: float
    flops_by_kind: dict[str, float]
    collectives: tuple[Collective, ...]
    arrays: tuple[Array, ...]
    unknown_loops: int
    arguments: tuple[str, ...] = ()


def analyse(text: str, *, unknown_trips: int = 1, ragged_share: float = 1.0, keep: int = 50) -> Program:
    """Costs of the program on one device. Counts every branch of a conditional, and a loop's condition once more than
    its body.

    ragged_share: share of the rows of a grouped matmul that exist. Buffers are made for the worst case, all tokens on
    one device's experts, and the kernels pass over rows that are not there; they still round up to whole tiles, which
    is not counted. arrays: the `keep` largest distinct results that are stored, without the padding of their layout;
    largest first. Raises ValueError where the text has no entry computation, or an instruction that cannot be read.
    """
    computations, entry = parse(text)
    devices = math.prod(
        int(n) for n in re.findall(r"\b(?:replica_count|num_partitions)=(\d+)", text[: text.find("\n")])
    )
    walk = Walk(computations, unknown_trips, ragged_share, devices)
    walk.visit(entry, times=1)
    arguments = [ins for ins in entry.instructions.values() if ins.opcode == "parameter"]
    walk.arrays.update(map(arrays_of, arguments))
    arrays = sorted({array for arrays in walk.arrays for array in arrays}, key=lambda array: (-array.bytes, array))
    names = tuple(ins.op_name or ins.name for ins in arguments)
    moved, largest = tuple(walk.collectives), tuple(arrays[:keep])
    return Program(sum(walk.flops.values()), walk.flops, moved, largest, walk.unknown_loops, names)


@dataclasses.dataclass
class Walk:
    computations: dict[str, Computation]
    unknown_trips: int
    ragged_share: float
    devices: int
    flops: dict[str, float] = dataclasses.field(default_factory=lambda: {"dot": 0.0, "ragged": 0.0})
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    arrays: set[tuple[Array, ...]] = dataclasses.field(default_factory=set)
    unknown_loops: int = 0

    def visit(
        self,
        scope: Computation,
        times: int,
        caller: Instruction | None = None,
        groups: int = 0,
        frames: tuple[Frame, ...] = (),
    ) -> None:
        """Add what `times` executions of a computation cost.

        caller: the fusion or asynchronous call around it, if any; what is made in there is not stored. groups: above 0
        inside a fusion that skips masked tiles, where a convolution over all groups is a grouped matmul. frames: all
        calls that led here.
        """
        for ins in scope.instructions.values():
            kind = ins.opcode.removesuffix("-start")
            if caller is None and ins.opcode not in ALIASES and not ins.opcode.endswith("-start"):
                self.arrays.add(arrays_of(ins))
            if kind in COLLECTIVES and not is_continued(ins, scope):
                self.collectives.append(self.collective(kind, ins, scope, times, caller, frames))
            elif ins.opcode in ("dot", "convolution"):
                flops = times * (dot_flops if ins.opcode == "dot" else convolution_flops)(ins, scope)
                self.flops["ragged" if groups else "dot"] += flops / groups * self.ragged_share if groups else flops
            elif ins.opcode == "ragged-dot" or is_ragged_kernel(ins):
                flops = (dot_flops if ins.opcode == "ragged-dot" else ragged_kernel_flops)(ins, scope)
                self.flops["ragged"] += times * flops * self.ragged_share
            for name, runs in self.callees(ins, scope):
                fused = ins if ins.opcode in ("fusion", "async-start") else caller
                called, skipped = self.computations[name], masked_groups(ins, scope) or groups
                self.visit(called, times * runs, fused, skipped, (*frames, Frame(scope.name, ins.name, name)))

    def callees(self, ins: Instruction, scope: Computation) -> list[tuple[str, int]]:
        """(computation, executions for one of the instruction's). What a reduce, scatter, sort or all-reduce applies
        costs nothing."""
        called = ins.called if ins.opcode in ("while", "conditional", "call", "fusion", "async-start") else {}
        if ins.opcode != "while":
            return [(name, 1) for names in called.values() for name in names]
        [body], [condition] = called["body"], called["condition"]
        known = KNOWN_TRIPS.search(ins.backend)
        trips = int(known[1]) if known else self.trips(ins, scope)
        self.unknown_loops += trips is None
        trips = self.unknown_trips if trips is None else trips
        return [(body, trips), (condition, trips + 1)]

    def collective(
        self,
        kind: str,
        ins: Instruction,
        scope: Computation,
        times: int,
        caller: Instruction | None,
        frames: tuple[Frame, ...],
    ) -> Collective:
        moved = given = [array for name in ins.operands for array in shapes_in(scope[name].shape)]
        if kind not in ("all-reduce", "reduce-scatter"):
            # A -start returns (operands, results, state of the transfer).
            results = shapes_in(ins.shape)
            moved = results[len(given) : 2 * len(given)] if ins.opcode.endswith("-start") else results
        if kind == "all-reduce" and scope.name.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # a TPU fusion: all-reduce, then the slice that stays, done as one
        if kind == "ragged-all-to-all":
            moved = min(moved, shapes_in(scope[ins.operands[0]].shape), key=lambda arrays: size_of(*arrays[0]))
        text = ", ".join(f"{dtype}[{','.join(map(str, dims))}]" for dtype, dims in moved)
        op_name, size = ins.op_name or (caller.op_name if caller else ""), sum(size_of(*array) for array in moved)
        sources = ()
        if kind in GATHERING:
            sources = tuple(origins(self.computations, Value(frames, scope.name, name)) for name in ins.operands)
        return Collective(kind, size, times, group_size(ins.attributes, self.devices), text, op_name, sources)

    def binary(self, scope: Computation, name: str) -> tuple[Instruction, list[Instruction]]:
        """The operation that made a value, and the sources of its operands; seen through a fusion around it."""
        ins = source(scope, name)
        if ins.opcode != "fusion":
            return ins, [source(scope, operand) for operand in ins.operands]
        inner = self.computations[ins.called["calls"][0]]
        op = source(inner, inner.root)
        made = [source(inner, operand) for operand in op.operands]
        return op, [source(scope, ins.operands[int(x.inside)]) if x.opcode == "parameter" else x for x in made]

    def trips(self, loop: Instruction, scope: Computation) -> int | None:
        """Trips of `while (i < limit) i += step` where start, step and limit are constants; None for any other loop.

        A constant may come in with the loop's state, in a place that the body hands on untouched.
        """
        condition, body = (self.computations[loop.called[key][0]] for key in ("condition", "body"))
        initial, handed_on = source(scope, loop.operands[0]), body[body.root]
        test, sides = self.binary(condition, condition.root)
        if (
            test.opcode != "compare"
            or "direction=LT" not in test.attributes
            or {initial.opcode, handed_on.opcode} != {"tuple"}
        ):
            return None

        def constant(ins: Instruction, within: Computation) -> int | None:
            place = place_of(ins, within)
            if place is not None and place_of(source(body, handed_on.operands[place]), body) == place:
                ins = source(scope, initial.operands[place])
            return ins.integer

        place, limit = place_of(sides[0], condition), constant(sides[1], condition)
        if place is None or limit is None:
            return None
        update, terms = self.binary(body, handed_on.operands[place])
        steps = [constant(term, body) for term in terms if place_of(term, body) != place]
        start = source(scope, initial.operands[place]).integer
        if update.opcode != "add" or len(steps) != 1 or not steps[0] or steps[0] < 0 or start is None:
            return None
        return max(0, -(-(limit - start) // steps[0]))
