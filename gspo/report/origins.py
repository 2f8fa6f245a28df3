"""Whose values a collective moves: back from an instruction to the arguments of the program, through all that copies.

What a collective brings to a device cannot be told from its shape: the weights of all experts may come as an
all-gather, or as the all-reduce that XLA makes of one (each device writes its part into zeros), with gate and up side
by side, flattened, or with the layers in front; and gradients and tokens may have the very same shapes. So the operand
is followed back through instructions that change nothing but the place, the order or the dtype of values.
"""

from typing import NamedTuple

from gspo.report.hlo import Computation, Instruction, index_of

# Opcode -> which of its operands hold the values; the others are indices, masks or padding.
MOVES = dict.fromkeys(
    ("copy", "bitcast", "convert", "reshape", "transpose", "concatenate", "optimization-barrier", "reduce-precision")
    + ("all-gather", "all-reduce", "all-to-all", "collective-permute", "collective-broadcast", "domain"),
    slice(None),
) | {
    "slice": slice(1),
    "dynamic-slice": slice(1),
    "broadcast": slice(1),
    "pad": slice(1),
    "reverse": slice(1),
    "dynamic-update-slice": slice(2),
    "select": slice(1, 3),
    "async": slice(1),
    "custom-call": slice(None),  # those of MOVING_CALLS
}
MOVING_CALLS = ("AsyncCollectiveStart", "AsyncCollectiveDone", "Sharding")
CALLS = ("fusion", "call", "conditional", "async-start")


class Frame(NamedTuple):
    """A computation that runs: the instruction that called it, and where this one stands."""

    scope: str
    caller: str
    callee: str


class Value(NamedTuple):
    """What an instruction gives: element `place` where it gives a tuple, all of it where None."""

    frames: tuple[Frame, ...]
    scope: str
    name: str
    place: int | None = None


def origins(computations: dict[str, Computation], value: Value) -> frozenset[str]:
    """Names of the program's arguments that a value holds elements of, as jax gave them ("params['w']")."""
    found, seen, todo = set(), set(), [value]
    while todo:
        value = todo.pop()
        if value in seen:
            continue
        seen.add(value)
        ins = computations[value.scope][value.name]
        if ins.opcode == "parameter" and not value.frames:
            found.add(ins.op_name or ins.name)
        else:
            todo += before(computations, value, ins)
    return frozenset(found)


def before(computations: dict[str, Computation], value: Value, ins: Instruction) -> list[Value]:
    """The values that this one was moved from; none where it was computed."""
    frames, scope, _, place = value
    operands = ins.operands
    if ins.opcode == "parameter":
        return handed_in(computations, value, ins)
    if ins.opcode == "get-tuple-element":
        return [Value(frames, scope, operands[0], index_of(ins))]
    if ins.opcode == "tuple":
        return [Value(frames, scope, name) for name in (operands if place is None else operands[place : place + 1])]
    if ins.opcode == "while":
        return [Value(frames, scope, operands[0], place), last_of(computations, value, ins)]
    if ins.opcode in CALLS:
        return [
            Value((*frames, Frame(scope, ins.name, name)), name, computations[name].root, place)
            for names in ins.called.values()
            for name in names
        ]
    if ins.opcode == "custom-call" and not any(f'"{name}"' in ins.attributes for name in MOVING_CALLS):
        return []
    moved = operands[MOVES.get(ins.opcode.removesuffix("-start").removesuffix("-done"), slice(0))]
    if place is not None and len(moved) > 1 and ins.shape.startswith("("):  # several arrays at once, each for itself
        return [Value(frames, scope, moved[place % len(moved)])]
    return [Value(frames, scope, name, place if len(moved) == 1 else None) for name in moved]


def handed_in(computations: dict[str, Computation], value: Value, ins: Instruction) -> list[Value]:
    """What the caller of a computation gives it as this parameter."""
    *outer, frame = value.frames
    caller = computations[frame.scope][frame.caller]
    at = Value(tuple(outer), frame.scope, frame.caller, value.place)
    if caller.opcode == "while":  # what stood in the loop's state before it, and what its body puts there
        return [at._replace(name=caller.operands[0]), last_of(computations, at, caller)]
    number = int(ins.inside)
    if caller.opcode == "conditional":  # the predicate, then one operand per branch
        branches = [name for names in caller.called.values() for name in names]
        number = 1 + branches.index(frame.callee)
    return [at._replace(name=caller.operands[number])]


def last_of(computations: dict[str, Computation], at: Value, loop: Instruction) -> Value:
    """What the body of a loop leaves in a place of its state."""
    [body] = loop.called["body"]
    return Value((*at.frames, Frame(at.scope, loop.name, body)), body, computations[body].root, at.place)
