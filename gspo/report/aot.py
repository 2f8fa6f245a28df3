"""What a run costs on hardware that is not there: its steps are compiled ahead of time for a TPU topology, and read.

`jax.experimental.topologies` describes the devices of a slice, libtpu compiles for them, and neither needs a TPU. The
steps are those of `gspo.steps`, which `gspo.rl` runs: rollout (with the move of the parameters into its layout),
log-probs, update. For each:

    memory       what the compiler will hold on one device, and what of the run lies beside it (the training state,
                 during rollouts)
    FLOPs        of matmuls on one device, against an equal share of those that the same step makes on one device for
                 all rows
    collectives  by kind: how many, and bytes on one device

Grouped matmuls are counted at balanced load: their buffers are made for the worst case, the kernels visit the rows that
exist. The decode loop is taken to run to the maximum length.
"""

import dataclasses
import importlib.metadata
import math
import os
import re
import time
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from gspo.held import bytes_per_device
from gspo.learning.decoded import cache_widths
from gspo.learning.rewards import CompletionRows
from gspo.model.transformer import param_shardings
from gspo.parallel.sharding import Layout, make_mesh, with_shardings
from gspo.plans import RLPlan
from gspo.report import program
from gspo.report.collectives import by_kind
from gspo.reward_source import abstract_reward_models
from gspo.steps import Steps, make_rollout_layout, make_steps
from gspo.types import Batch, LossInputs, UserError

GIB = 2**30
HBM_GIB = {"v5e": 15.75, "v5p": 95, "v6e": 31.25}  # of one chip, as much as the runtime leaves to programs


class Ids(NamedTuple):
    """As much of a tokenizer as shapes depend on."""

    vocab_size: int = 0
    eos_ids: tuple[int, ...] = (1,)
    pad_id: int = 0


class Cost(NamedTuple):
    """One step on one device; bytes, FLOPs per execution, seconds. `runs`: executions per rollout."""

    name: str
    runs: int
    compile_seconds: float
    arguments: int
    temporaries: int
    peak: int
    beside: int  # bytes of the run that lie in memory meanwhile and are no argument
    flops: float
    ideal_flops: float
    collectives: dict[str, tuple[int, int]]  # kind -> (executions, bytes)
    program: program.Program | None
    too_large: str = ""  # why the compiler refused, with its largest buffers

    @property
    def total(self) -> int:
        return self.peak + self.beside


# ---------------------------------------------------------------------------------------------------- topologies


def devices_of(topology: str) -> list[Any]:
    """ "v5p:4x4x4" -> its devices. Raises UserError where libtpu is missing or knows no such slice."""
    kind = topology.partition(":")[0]
    if kind not in HBM_GIB or not re.fullmatch(r"\d+(x\d+)+", topology.partition(":")[2]):
        raise UserError(
            f"--topology={topology}: write KIND:AxBxC with a kind of {', '.join(HBM_GIB)}, as v5p:4x4x4 or v5e:8x8"
        )
    # libtpu asks no metadata server what machine this is, and shares it with others that compile: it drives no TPU
    # here.
    for name, value in {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_ACCELERATOR_TYPE": "v5p-8",
                        "TPU_WORKER_HOSTNAMES": "localhost"}.items():  # fmt: skip
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")
    try:
        return list(topologies.get_topology_desc(topology, "tpu").devices)
    except Exception as error:  # jax, jaxlib and libtpu each have their own
        if "not installed" in str(error):
            raise UserError("--topology: compiling for a TPU needs libtpu; pip install -e '.[aot]'") from None
        raise UserError(f"--topology={topology}: {str(error).splitlines()[0]}") from None


# ---------------------------------------------------------------------------------------------------- arguments


class Lowerable(NamedTuple):
    name: str
    function: Any  # jitted
    arguments: tuple[Any, ...]  # abstract, with shardings
    runs: int
    loops: int  # trips of the loop whose length only the run knows
    ragged_rows: float  # share of the rows of a grouped matmul's buffer that exist at balanced load
    beside: int


def lowerables(plan: RLPlan, layout: Layout) -> list[Lowerable]:
    """The steps of a run with the arguments that it would call them with."""
    if not plan.model.fields["vocab_size"]:
        raise UserError("model.vocab_size=0: no tokenizer is read here; give the number of ids")
    steps: Steps = make_steps(plan, layout, Ids())
    if plan.experience.router_kl or "old_router_logp_LBCX" in steps.objective.needs:
        raise UserError(
            "the report knows no measures of routers yet: set router_shift_floor and log.router_kl off, and add what "
            "they take"
        )
    if plan.reference.storage.offload or plan.experience.reward_model_storage.offload:
        raise UserError(
            "the report knows no memory of the host: set ref_offload and reward_model.offload to False; beside the "
            "steps that read them these trees take nothing"
        )
    Q, P, C = plan.rollout.num_prompts, plan.data.max_prompt_length, plan.data.max_completion_length
    state = steps.abstract
    rows = layout.sharding("rows")
    prompts = (jax.ShapeDtypeStruct((Q, P), "int32", sharding=rows), jax.ShapeDtypeStruct((Q,), "int32", sharding=rows))
    key = with_shardings(jax.eval_shape(lambda: jax.random.key(0)), layout.sharding())
    rollout_layout = make_rollout_layout(plan.mesh, layout)
    params = jax.eval_shape(steps.rollout_params, state.policy)
    params = with_shardings(params, param_shardings(steps.model, rollout_layout))
    rollout = layout.map_fields(with_shardings, jax.eval_shape(steps.sampler, params, *prompts, key))
    judges = abstract_reward_models(plan, steps)
    held = bytes_per_device((state, [judge.params for judge in judges.values()]))
    policy_size, found = bytes_per_device(state.policy), []
    beside = held
    if jax.tree.leaves(params) == jax.tree.leaves(state.policy):
        beside -= policy_size  # rollouts read the learner's own
    else:
        found.append(Lowerable("reshard", steps.rollout_params, (state.policy,), 1, 1, 1.0, held - policy_size))
    # The cache grows in loops one after the other, of C - 1 trips together: each is taken to have its share.
    trips = C - 1 if plan.rollout.max_num_seqs else round((C - 1) / len(cache_widths(C)))
    found.append(
        Lowerable(
            "rollout", steps.sampler, (params, *prompts, key), 1, trips, ragged_rows(steps, rollout_layout), beside
        )
    )

    batch = _batch_of(plan, layout, rollout, C)
    around, ragged = held + bytes_per_device(batch), ragged_rows(steps, layout)

    def add(name: str, function: Any, tree: Any, *more: Any, runs: int = 1):
        """A step of the learner that reads a tree of those that are held: the others lie beside it, with the batch."""
        beside = around - bytes_per_device(tree)
        found.append(Lowerable(name, function, (tree, *more), runs, 1, ragged, beside))

    frames = (batch.tokens_BT, batch.prompt_lengths_B)
    for name, judge in judges.items():
        add(name, judge.reward, judge.params, CompletionRows(*frames, batch.completion_lengths_B))
    if plan.experience.old_logps == "learner" or plan.experience.replay == "R2":
        add("log-probs", steps.scorer, state.policy, *frames)  # R3 gives routes too, which changes no matmul
    if state.ref_params is not None:
        add("reference", steps.scorer, state.ref_params, *frames)
    if plan.critic:
        add("values", steps.value_fn, state.critic.params, *frames)
    parts = jax.eval_shape(steps.minibatches, batch)
    part = layout.map_fields(with_shardings, parts[0])
    add("update", steps.train_step, state, part, runs=plan.updates)
    if plan.critic:
        add("critic", steps.critic_step, state.critic, part, runs=plan.updates)
    return found


def _batch_of(plan: RLPlan, layout: Layout, rollout: Any, C: int) -> Batch:
    """The batch that the updates share, as `gspo.collect` fills it without measures of routers."""
    B = rollout.tokens_BT.shape[0]
    float_BC = jax.ShapeDtypeStruct((B, C), "float32")
    inputs = LossInputs(
        logp_BC=None, old_logp_BC=float_BC, advantages_BC=float_BC, mask_BC=jax.ShapeDtypeStruct((B, C), "bool"),
        sampler_logp_BC=float_BC, ref_logp_BC=float_BC if plan.needs_reference else None,
    )  # fmt: skip
    frames = {name: getattr(rollout, name) for name in ("tokens_BT", "prompt_lengths_B", "completion_lengths_B")}
    replay = plan.experience.replay != "disabled"
    routes = {"old_routes_LBTX": rollout.routes_LBTX, "replayed_routes_LBTX": rollout.routes_LBTX if replay else None}
    values = {"old_values_BC": float_BC, "returns_BC": float_BC} if plan.critic else {}
    return layout.map_fields(with_shardings, Batch(**frames, **routes, **values, inputs=inputs))


def ragged_rows(steps: Steps, layout: Layout) -> float:
    """Pairs per device at balanced load, over the rows of the buffer that `gspo.model.dispatch` makes for them."""
    spec, n = steps.model.spec, layout.parts("expert")
    return (
        spec.experts_per_token / (n * min(spec.experts_per_token, spec.num_experts // n)) if spec.num_experts else 1.0
    )


# ---------------------------------------------------------------------------------------------------- costs


def matmul_flops(jaxpr: Any, unknown_trips: int = 1) -> float:
    """2 x multiply-adds of the dots and grouped dots of a jaxpr, loops multiplied out, all branches of a conditional
    counted."""
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2.0 * eqn.outvars[0].aval.size * math.prod(shape[i] for i in contracted)
        elif eqn.primitive.name == "ragged_dot_general":
            (contracted, _), _ = eqn.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
            lhs, groups, out = eqn.invars[0].aval, eqn.invars[2].aval.shape[-1], eqn.outvars[0].aval
            by_group = out.ndim == 3  # the ragged axis is summed over: a gradient for each expert
            total += 2.0 * out.size / (groups if by_group else 1) * math.prod(lhs.shape[i] for i in contracted)
        trips = {"scan": eqn.params.get("length"), "while": unknown_trips}.get(eqn.primitive.name, 1)
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                total += trips * matmul_flops(getattr(inner, "jaxpr", inner), unknown_trips)
    return total


def _is_jaxpr(x: Any) -> bool:
    return hasattr(x, "eqns") or hasattr(getattr(x, "jaxpr", None), "eqns")


def cost(step: Lowerable, ideal_flops: float) -> Cost:
    """Compiles one step. A program that the compiler finds too large for one device comes back with its complaint;
    where it refuses for another reason (an operation that the chip has not), UserError."""
    start = time.perf_counter()
    try:
        compiled = step.function.lower(*step.arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise UserError(
                f"{step.name}: the compiler refuses it for this slice: {str(error).splitlines()[0]}"
            ) from None
        seconds = time.perf_counter() - start
        return Cost(
            step.name, step.runs, seconds, 0, 0, 0, step.beside, 0.0, ideal_flops, {}, None, _complaint(str(error))
        )
    seconds, memory = time.perf_counter() - start, compiled.memory_analysis()
    found = program.analyse(compiled.as_text(), unknown_trips=step.loops, ragged_share=step.ragged_rows)
    live = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
    return Cost(
        name=step.name,
        runs=step.runs,
        compile_seconds=seconds,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=live,
        beside=step.beside,
        flops=found.flops,
        ideal_flops=ideal_flops,
        collectives=by_kind(found.collectives),
        program=found,
    )


def _complaint(text: str) -> str:
    """The compiler's own account of a program that does not fit: its first line, and the largest buffers."""
    head = next(
        (line.strip() for line in text.splitlines() if "Used" in line or "exceed" in line.lower()), text.splitlines()[0]
    )
    buffers = re.findall(r"Size: (\S+)\s.*?(?:Operator: op_name=\"([^\"]*)\".*?)?Shape: (\S+)", text, flags=re.DOTALL)
    return "; ".join([head, *(f"{size} {shape} {name}".strip() for size, name, shape in buffers[:5])])


def _of_one_device(plan: RLPlan, layout: Layout) -> RLPlan:
    """The plan with as many rows at a time as a device of the layout has: as many have their prompt in common."""
    rows = max(plan.rows_at_a_time // layout.parts("rows"), 1)
    return dataclasses.replace(plan, update=dataclasses.replace(plan.update, micro_batch_size=rows))


def report(plan: RLPlan, layout: Layout) -> list[Cost]:
    """The costs of every step of a run on the devices of a layout. Raises UserError."""
    alone = Layout(make_mesh({}, jax.devices("cpu")[:1]))
    ideal = {}
    for step in lowerables(_of_one_device(plan, layout), alone):
        jaxpr = jax.make_jaxpr(step.function)(
            *jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), step.arguments)
        )
        ideal[step.name] = matmul_flops(jaxpr.jaxpr, step.loops) / layout.mesh.size
    return [cost(step, ideal.get(step.name, 0.0)) for step in lowerables(plan, layout)]


# ---------------------------------------------------------------------------- what the report says


def table(costs: list[Cost], topology: str) -> str:
    """Markdown: one row per step, sizes in GiB per device, FLOPs and collectives per execution."""
    limit = HBM_GIB[topology.partition(":")[0]]
    head = (
        "step",
        "per rollout",
        "arguments",
        "temporaries",
        "peak",
        "beside it",
        f"total of {limit} GiB",
        "FLOPs",
        "÷ ideal",
        "collectives: count, GiB",
        "compiled in",
    )
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for c in costs:
        moved = "; ".join(f"{kind} {n:,}, {size / GIB:.2f}" for kind, (n, size) in c.collectives.items()) or "none"
        sizes = ["-"] * 3 if c.too_large else [f"{size / GIB:.2f}" for size in (c.arguments, c.temporaries, c.peak)]
        total = "does not fit" if c.too_large else f"{c.total / GIB:.2f}"
        share = f"{c.flops / c.ideal_flops:.3f}" if c.ideal_flops and not c.too_large else "-"
        flops = "-" if c.too_large else f"{c.flops:.2e}"
        cells = (
            c.name,
            c.runs,
            *sizes,
            f"{c.beside / GIB:.2f}",
            total,
            flops,
            share,
            moved,
            f"{c.compile_seconds:.0f} s",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def as_json(plan: RLPlan, layout: Layout, costs: list[Cost], topology: str) -> dict[str, Any]:
    """The numbers of the table, and where the bytes of the collectives come from."""
    steps = {}
    for c in costs:
        sources: dict[str, float] = {}
        for x in c.program.collectives if c.program else ():
            source = source_of(x.op_name)
            sources[source] = sources.get(source, 0) + x.bytes * x.count
        steps[c.name] = c._asdict() | {"total": c.total, "sources": sources}
        del steps[c.name]["program"]
    fields = (
        "num_prompts",
        "num_generations",
        "max_prompt_length",
        "max_completion_length",
        "updates_per_rollout",
        "micro_batch_size",
    )
    return {
        "topology": topology, "devices": layout.mesh.size, "mesh": dict(layout.mesh.shape), "rules": layout.rules,
        "rollout_rules": plan.mesh.rollout_rules, "dispatch": layout.dispatch,
        "rollout_dispatch": plan.mesh.rollout_dispatch, "jax": jax.__version__, "libtpu": libtpu_version(),
        "config": {name: plan.written[name] for name in fields}, "steps": steps,
    }  # fmt: skip


SOURCES = (  # what a collective serves, by a word in the name that its operation was traced under
    ("moe", "experts"),
    ("attention", "attention"),
    ("mlp", "feed-forward"),
    ("embedding", "embedding"),
    ("_take", "embedding"),
    ("logits", "head"),
    ("all_gather", "head"),
    ("psum", "head"),
    ("convert_element_type", "parameters"),
)


def source_of(op_name: str) -> str:
    """The part of the model that a collective belongs to."""
    return next((source for word, source in SOURCES if word in op_name), "other")


def libtpu_version() -> str:
    return importlib.metadata.version("libtpu")
