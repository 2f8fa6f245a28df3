"""What must be true of a run that is to be started on a slice of accelerators, read off its compiled steps."""

import math
import re

from gspo.model.transformer import ModelSpec
from gspo.parallel.sharding import Layout
from gspo.plans import RLPlan
from gspo.report.aot import GIB, HBM_GIB, Cost
from gspo.report.hlo import shapes_in

EXPERTS = re.compile(r"\bmoe\b.*\b(gate|up|down)\b")  # what gspo.model.moe calls their weights, and Adam their moments


def checks(plan: RLPlan, layout: Layout, costs: list[Cost], topology: str) -> list[tuple[bool, str]]:
    """(holds, sentence) for what must be true of a run that is to be started on such a slice."""
    limit = HBM_GIB[topology.partition(":")[0]] * GIB
    found = []
    for c in costs:
        if c.too_large:
            found.append((False, f"{c.name}: {c.too_large}"))
        elif c.total > limit:
            largest = "; ".join(
                f"{a.bytes / GIB:.2f} GiB {a.dtype}{list(a.dims)} {a.op_name}" for a in c.program.arrays[:5]
            )
            found.append(
                (
                    False,
                    f"{c.name}: {c.total / GIB:.1f} GiB per device are more than {limit / GIB:g}; largest: {largest}",
                )
            )
    compiled = [c for c in costs if c.program]
    most = max(compiled, key=lambda c: c.total, default=None)
    if most and all(ok for ok, _ in found):
        found.append((True, f"fits: at most {most.total / GIB:.1f} of {limit / GIB:g} GiB per device ({most.name})"))
    worst = max((c for c in compiled if c.ideal_flops), key=lambda c: abs(c.flops / c.ideal_flops - 1), default=None)
    if worst:
        off = worst.flops / worst.ideal_flops - 1
        found.append(
            (
                abs(off) <= 0.15,
                f"FLOPs per device are an equal share of the total to {off:+.1%} or better ({worst.name})",
            )
        )
    found.append(no_gathered_experts(plan.model.spec(1), compiled))
    found.append(no_logits_of_whole_rows(plan, layout, compiled))
    return found


def no_gathered_experts(model: ModelSpec, compiled: list[Cost]) -> tuple[bool, str]:
    """No collective brings a device as many weights of experts as a layer has in all. Where they come from is followed
    back to the arguments of the step, so that their shape on the way does not matter; those of gate and up side by side
    may be twice as many."""
    if not model.num_experts:
        return True, "there are no experts to gather"
    unnamed = [c.name for c in compiled if not any(EXPERTS.search(name) for name in c.program.arguments)]
    if unnamed:
        return False, f"{unnamed[0]}: no argument of the program is named as the experts' weights, to look for gathers"
    layer = model.num_experts * model.d_model * model.d_expert
    largest, what = 0.0, ""
    for x in (x for c in compiled for x in c.program.collectives):
        for (dtype, dims), names in zip(shapes_in(x.shape), x.origins, strict=False):
            experts = [name for name in names if EXPERTS.search(name)]
            share = math.prod(dims) / (layer * len(experts)) if experts else 0.0
            if share > largest:
                largest, what = share, f"{x.kind} {dtype}{list(dims)} of {', '.join(experts)} {x.op_name}"
    if largest >= 1:
        return False, f"a collective brings the weights of all experts to one device: {what}"
    return True, f"no collective brings all experts' weights to one device; at most {largest:.1%} of a layer's"


def no_logits_of_whole_rows(plan: RLPlan, layout: Layout, compiled: list[Cost]) -> tuple[bool, str]:
    """A float32 array of the vocabulary by all completion columns of a device's rows. The head's gradient, [D, V], is
    none."""
    V = plan.model.fields["vocab_size"] // layout.parts("vocab")
    rows = (plan.update.micro_batch_size or plan.rollout.rows) // layout.parts("rows")
    wide = [a for c in compiled for a in c.program.arrays if a.dtype == "f32" and V in a.dims]
    wide = [a for a in wide if sorted(a.dims) != sorted((plan.model.fields["d_model"], V))]
    largest = max(wide, key=lambda a: a.bytes, default=None)
    if largest and largest.bytes >= 4 * V * rows * plan.data.max_completion_length:
        return False, f"float32 logits of whole rows exist: f32{list(largest.dims)} {largest.op_name}"
    size = f"; the largest array of logits is f32{list(largest.dims)}, {largest.bytes / GIB:.2f} GiB" if largest else ""
    return True, f"no [B, T, V] float32 array{size}"
