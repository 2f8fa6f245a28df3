"""FLOPs of one instruction of a compiled program: 2 x multiply-adds of what is a matmul.

A TPU program hides them: a dot is a convolution inside a fusion, its batch dimensions are spatial ones with a window
that meets each element once, and a grouped matmul is a kernel or a masked convolution.
"""

import math
import re
from functools import lru_cache

from gspo.report.hlo import Computation, Instruction, dims_of, numbers, value_of


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


def masked_groups(ins: Instruction, scope: Computation) -> int:
    """Groups of a grouped matmul written as a convolution under a mask pred[groups, rows] whose empty tiles are
    skipped; else 0."""
    operands = [scope[name] for name in ins.operands] if "ITERATION_SKIPPER_MODE_" in ins.backend else []
    return next((dims_of(mask)[0] for mask in operands if mask.shape.startswith("pred[")), 0)
