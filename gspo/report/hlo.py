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
from functools import lru_cache
from typing import NamedTuple

COLLECTIVES = {"all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ragged-all-to-all", "collective-permute"}
COLLECTIVES |= {"collective-broadcast"}
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
SAME_VALUE = {"copy", "bitcast", "convert", "reshape", "copy-start", "copy-done", "optimization-barrier"}

# `%name (parameters) -> shape {` in the first column opens a computation.
COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
# `  ROOT %name = shape opcode(operands), attribute=...`. A shape is a word or, in parentheses, several; its layout may
# hold parentheses too, but never `) opcode(`. Operands may hold shapes as well, but never `), attribute=`.
INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([a-z][a-z0-9-]*)\((.*?)\)((?:, [\w-]+=.*)?)$")
ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,<=]*)\]")
NAME = re.compile(r"%([\w.-]+)")
CALLED = re.compile(
    r"\b(calls|to_apply|condition|body|true_computation|false_computation|branch_computations)=(\{[^}]*\}|%[\w.-]+)"
)
KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


class Collective(NamedTuple):
    """One collective instruction: how much it moves at a time and how often.

    bytes: size on one device of the larger side, for one execution: the operand of an all-reduce and a reduce-scatter,
    the result otherwise; but of the smaller one for a ragged all-to-all, whose other side is made for the worst case.
    shape: as "bf16[16,2048]"."""

    kind: str
    bytes: int
    count: int
    group_size: int
    shape: str
    op_name: str


class Array(NamedTuple):
    dtype: str
    dims: tuple[int, ...]
    bytes: int
    opcode: str
    op_name: str


class Program(NamedTuple):
    """flops: 2 x multiply-adds per device. unknown_loops: loops whose trips nobody could tell, taken `unknown_trips`
    times."""

    flops: float
    flops_by_kind: dict[str, float]
    collectives: tuple[Collective, ...]
    arrays: tuple[Array, ...]
    unknown_loops: int


class Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    inside: str  # the text between the parentheses
    attributes: str  # what follows them
    backend: str  # and what the compiler noted for itself

    @property
    def operands(self) -> list[str]:
        return NAME.findall(self.inside)

    @property
    def op_name(self) -> str:
        return value_of(r'op_name="([^"]*)"', self.attributes)

    @property
    def integer(self) -> int | None:
        """The value of a scalar constant."""
        return int(self.inside) if self.opcode == "constant" and re.fullmatch(r"-?\d+", self.inside) else None

    @property
    def called(self) -> dict[str, list[str]]:
        return {key: NAME.findall(names) for key, names in CALLED.findall(self.attributes)}


@dataclasses.dataclass
class Computation:
    name: str
    instructions: dict[str, Instruction] = dataclasses.field(default_factory=dict)
    root: str = ""

    def __getitem__(self, name: str) -> Instruction:
        return self.instructions[name]


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
    walk.arrays.update(arrays_of(ins) for ins in entry.instructions.values() if ins.opcode == "parameter")
    arrays = sorted({array for arrays in walk.arrays for array in arrays}, key=lambda array: (-array.bytes, array))
    return Program(
        sum(walk.flops.values()), walk.flops, tuple(walk.collectives), tuple(arrays[:keep]), walk.unknown_loops
    )


def by_kind(collectives: tuple[Collective, ...]) -> dict[str, tuple[int, int]]:
    """kind -> (executions, bytes of all of them), most bytes first."""
    totals: dict[str, tuple[int, int]] = {}
    for c in collectives:
        count, size = totals.get(c.kind, (0, 0))
        totals[c.kind] = (count + c.count, size + c.count * c.bytes)
    return dict(sorted(totals.items(), key=lambda item: -item[1][1]))


# ---- Text to instructions ----


def parse(text: str) -> tuple[dict[str, Computation], Computation]:
    """All computations by name, and the entry. A backend_config may be a megabyte of base64: it is cut off before any
    matching."""
    computations: dict[str, Computation] = {}
    entry = current = None
    for line in text.splitlines():
        if line[:1] not in (" ", "\t"):
            if opening := COMPUTATION.match(line):
                current = computations[opening[2]] = Computation(opening[2])
                entry = current if opening[1] else entry
            continue
        head, _, backend = line.partition(", backend_config=")
        if current and (match := INSTRUCTION.match(head.rstrip())):
            root, name, *fields = match.groups()
            current.instructions[name] = Instruction(name, *fields, backend)
            current.root = name if root else current.root
        elif current and " = " in head:
            raise ValueError(f"not an HLO instruction: {head.strip()[:200]}")
    if entry is None:
        raise ValueError("not HLO text: no ENTRY computation")
    return computations, entry


def value_of(pattern: str, text: str) -> str:
    """The first group of the first match, or an empty text."""
    return (re.search(pattern, text) or ["", ""])[1]


def numbers(pattern: str, text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", value_of(pattern, text))]


def shapes_in(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, dims) of the array, or of each array of a tuple. A dimension <=8 counts as 8."""
    return [(dtype, tuple(int(n) for n in re.findall(r"\d+", dims))) for dtype, dims in ARRAY.findall(shape)]


def dims_of(ins: Instruction) -> tuple[int, ...]:
    return shapes_in(ins.shape)[0][1]


def size_of(dtype: str, dims: tuple[int, ...]) -> int:
    """Bytes, rounded up. The first number in a type's name is its bits (s4, bf16, f8e4m3fn, c64); a token or opaque
    value has none."""
    bits = 8 if dtype == "pred" else int(value_of(r"(\d+)", dtype) or 0)
    return -(-math.prod(dims) * bits // 8)


def arrays_of(ins: Instruction) -> tuple[Array, ...]:
    return tuple(
        Array(dtype, dims, size_of(dtype, dims), ins.opcode, ins.op_name) for dtype, dims in shapes_in(ins.shape)
    )


# ---- FLOPs of one instruction ----


def dot_flops(ins: Instruction, scope: Computation) -> int:
    """A dot or a ragged-dot, whose groups share the rows: where these are contracted, each group of the output sees its
    own only."""
    contracted = numbers(r"lhs_contracting_dims=\{([^}]*)\}", ins.attributes)
    lhs = dims_of(scope[ins.operands[0]])
    flops = 2 * math.prod(dims_of(ins)) * math.prod(lhs[i] for i in contracted)
    splits = set(numbers(r"lhs_ragged_dims=\{([^}]*)\}", ins.attributes)) & set(contracted)
    return flops // dims_of(scope[ins.operands[2]])[-1] if splits else flops


@lru_cache(maxsize=4096)
def window_hits(out: int, size: int, stride: int, pad: int, base: int, base_dilation: int, dilation: int) -> int:
    """Pairs (output position o, window position k) of one dimension that meet an element: not padding, not a hole of
    the dilation.

    They meet element e where o * stride + k * dilation - pad = e * base_dilation. For each k that is a congruence for o
    with one solution modulo base_dilation / gcd(stride, base_dilation), between the o of the first and of the last
    element."""
    hits, common = 0, math.gcd(stride, base_dilation)
    period = base_dilation // common
    for k in range(size):
        offset = pad - k * dilation
        if offset % common == 0:
            first = offset // common * pow(stride // common, -1, period) % period
            low, high = max(0, -(-offset // stride)), min(out - 1, (offset + (base - 1) * base_dilation) // stride)
            hits += max(0, (high - first) // period - (low - 1 - first) // period)
    return hits


def convolution_flops(ins: Instruction, scope: Computation) -> int:
    """2 x output batch x output features x input features of the kernel x the hits of each spatial dimension's window.

    A TPU compiler writes batch dimensions of a dot as spatial ones, dilated so that the window meets one element at
    each position: N hits, not N². Feature groups stand in the kernel's input features already, batch groups in the
    output batch."""
    lhs_labels, rhs_labels, out_labels = re.split("_|->", value_of(r"dim_labels=([\w>-]+)", ins.attributes))
    lhs, rhs = (dims_of(scope[name]) for name in ins.operands[:2])
    out = dims_of(ins)
    field = {
        key: sizes.split("x")
        for key, sizes in re.findall(r"(\w+)=(\S+)", value_of(r"window=\{([^}]*)\}", ins.attributes))
    }
    flops = 2 * out[out_labels.index("b")] * out[out_labels.index("f")] * rhs[rhs_labels.index("i")]
    for d in range(len(field.get("size", ()))):
        stride, base_dilation, dilation = (
            int(field[key][d]) if key in field else 1 for key in ("stride", "lhs_dilate", "rhs_dilate")
        )
        pad = int(field["pad"][d].split("_")[0]) if "pad" in field else 0
        base, positions = lhs[lhs_labels.index(str(d))], out[out_labels.index(str(d))]
        flops *= window_hits(positions, int(field["size"][d]), stride, pad, base, base_dilation, dilation)
    return flops


def ragged_kernel_flops(ins: Instruction, scope: Computation) -> int:
    """A Mosaic kernel: [rows, K] x [groups, K, N] -> [rows, N] or, for the weights, [rows, K] x [rows, N] -> [groups,
    K, N]."""
    out = dims_of(ins)
    lhs, rhs = [dims for dims in (dims_of(scope[name]) for name in ins.operands) if len(dims) > 1][-2:]
    return 2 * math.prod(out) * lhs[1] if len(out) == 2 else 2 * math.prod(lhs) * rhs[1]


def is_ragged_kernel(ins: Instruction) -> bool:
    """The kernel with the groups' boundaries (`ragged-dot-metadata`) returns a tuple, and multiplies nothing."""
    is_kernel = ins.opcode == "custom-call" and '"tpu_custom_call"' in ins.attributes and not ins.shape.startswith("(")
    return is_kernel and re.search("ragged[-_]dot", ins.name + ins.op_name) is not None


# ---- Participants of a collective, origin of a value ----


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


def source(scope: Computation, name: str) -> Instruction:
    """The instruction that made a value, seen through copies and through tuples that are made and taken apart."""
    ins = scope[name]
    while True:
        of = scope.instructions.get(ins.operands[0]) if ins.operands else None
        if ins.opcode in SAME_VALUE:
            ins = of
        elif ins.opcode == "get-tuple-element" and of.opcode == "tuple":
            ins = scope[of.operands[index_of(ins)]]
        else:
            return ins


def index_of(ins: Instruction) -> int:
    return numbers(r"\bindex=(\d+)", ins.attributes)[0]


def place_of(ins: Instruction, scope: Computation) -> int | None:
    """Which element of its computation's only parameter, a loop's state, an instruction is."""
    of = scope.instructions.get(ins.operands[0]) if ins.opcode == "get-tuple-element" else None
    return index_of(ins) if of and of.opcode == "parameter" else None


# ---- The walk ----


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

    def visit(self, scope: Computation, times: int, caller: Instruction | None = None, groups: int = 0) -> None:
        """Add what `times` executions of a computation cost.

        caller: the fusion or asynchronous call around it, if any; what is made in there is not stored. groups: above 0
        inside a fusion that skips masked tiles, where a convolution over all groups is a grouped matmul.
        """
        for ins in scope.instructions.values():
            kind = ins.opcode.removesuffix("-start")
            if caller is None and ins.opcode not in ALIASES and not ins.opcode.endswith("-start"):
                self.arrays.add(arrays_of(ins))
            if kind in COLLECTIVES and not is_continued(ins, scope):
                self.collectives.append(self.collective(kind, ins, scope, times, caller))
            elif ins.opcode in ("dot", "convolution"):
                flops = times * (dot_flops if ins.opcode == "dot" else convolution_flops)(ins, scope)
                self.flops["ragged" if groups else "dot"] += flops / groups * self.ragged_share if groups else flops
            elif ins.opcode == "ragged-dot" or is_ragged_kernel(ins):
                flops = (dot_flops if ins.opcode == "ragged-dot" else ragged_kernel_flops)(ins, scope)
                self.flops["ragged"] += times * flops * self.ragged_share
            for name, runs in self.callees(ins, scope):
                fused = ins if ins.opcode in ("fusion", "async-start") else caller
                self.visit(self.computations[name], times * runs, fused, masked_groups(ins, scope) or groups)

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
        self, kind: str, ins: Instruction, scope: Computation, times: int, caller: Instruction | None
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
        return Collective(kind, size, times, group_size(ins.attributes, self.devices), text, op_name)

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


def is_continued(ins: Instruction, scope: Computation) -> bool:
    """Whether a collective is a later link of one that is counted where it starts.

    A TPU compiler spreads a collective over fusions: one with AsyncCollectiveStart, some that compute something else
    meanwhile, one with AsyncCollectiveDone. The instruction stands in each of them, with the number of its chain.
    """
    is_link = "chain_id=" in ins.attributes
    return is_link and not any('"AsyncCollectiveStart"' in other.attributes for other in scope.instructions.values())


def masked_groups(ins: Instruction, scope: Computation) -> int:
    """Groups of a grouped matmul written as a convolution under a mask pred[groups, rows] whose empty tiles are
    skipped; else 0."""
    operands = [scope[name] for name in ins.operands] if "ITERATION_SKIPPER_MODE_" in ins.backend else []
    return next((dims_of(mask)[0] for mask in operands if mask.shape.startswith("pred[")), 0)
