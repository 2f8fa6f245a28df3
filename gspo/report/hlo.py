"""The text of a compiled program (`compiled.as_text()`) as instructions: names, shapes, operands, attributes."""

import dataclasses
import math
import re
from typing import NamedTuple

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


class Array(NamedTuple):
    dtype: str
    dims: tuple[int, ...]
    bytes: int
    opcode: str
    op_name: str


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
        return value_of(r'op_name="([^"]*)"', self.attributes).replace("\\'", "'")

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


# ---- Where a value comes from ----


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
