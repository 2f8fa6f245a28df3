"""What scripts/benchmark.py measures: each case takes works that differ in one field, and gives a record for each.

All arms of a case are called in turns, with the yardsticks of the machine between them. A record holds seconds (median,
min, max), tokens/s, FLOPs by hand (`gspo.report.flops`) and what they are of the matrix product's rate.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from gspo import objectives
from gspo.model.experts import BACKENDS
from gspo.model.moe import MoE
from gspo.report.flops import decode_bytes, layer_weights, phase_flops
from gspo.report.measure import interleaved, peak_memory, program_memory, rates, spread, yardsticks
from gspo.report.workload import Work
from gspo.steps import optimizer_of
from gspo.types import UserError

Record = dict[str, Any]
Works = dict[str, Work]  # by the name of the arm


def measured(functions: dict[str, Callable], works: Works, repeats: int, small: bool) -> tuple[dict, Record]:
    """Seconds of each function, and what the machine could do in the same turns."""
    yard, amounts = yardsticks(next(iter(works.values())).spec.compute_dtype, small)
    seconds = interleaved(functions | yard, repeats, warmup=1 if small else 2)
    return seconds, rates(seconds, amounts)


def against_product(seconds: float, needed: float, frames: float, machine: Record) -> Record:
    """FLOP/s of what was needed, prompts once per group, and of whole frames; each as a share of the product's."""
    rate = machine["matmul_flops_per_s"]
    return {
        "flops_needed": needed,
        "flops_frames": frames,
        "flops_per_s": needed / seconds,
        "share_of_matmul": needed / seconds / rate,
        "share_of_matmul_frames": frames / seconds / rate,
    }


def lengths_of(work: Work) -> Record:
    """Of the completions of the last rollout, in tokens."""
    lengths_B = np.asarray(work.lengths_B)
    return {"mean": float(lengths_B.mean()), "max": int(lengths_B.max()), "total": int(lengths_B.sum())}


# ---------------------------------------------------------------------------------------------------- a step


def step(works: Works, repeats: int, small: bool) -> tuple[list[Record], Record]:
    """What the loop does between two evaluations, and its phases."""
    phases: dict[str, list[dict[str, float]]] = {name: [] for name in works}

    def timed(name: str) -> jax.Array:
        done = works[name].step()
        phases[name].append(works[name].timer.take())
        return done

    seconds, machine = measured({n: functools.partial(timed, n) for n in works}, works, repeats, small)
    return [_step_record(name, works[name], seconds[name], phases[name][-repeats:], machine) for name in works], machine


def _step_record(name: str, work: Work, seconds: list[float], phases: list, machine: Record) -> Record:
    whole, sizes, lengths = spread(seconds), work.sizes(), lengths_of(work)
    needed, frames = (phase_flops(work.spec, sizes, shared=shared) for shared in (True, False))
    parts = {}
    for phase in phases[0]:
        parts[phase] = {"seconds": spread([turn[phase] for turn in phases])}
        if phase in needed:
            median = parts[phase]["seconds"]["median"]
            parts[phase] |= against_product(median, needed[phase], frames[phase], machine)
    return {
        "name": name,
        "seconds": whole,
        "phases": parts,
        "completions": lengths,
        "tokens_per_s": lengths["total"] / whole["median"],
        "memory": peak_memory(),
        "first_step_at": work.first_step_at,
    } | against_product(whole["median"], sum(needed.values()), sum(frames.values()), machine)


def replay(works: Works, repeats: int, small: bool) -> tuple[list[Record], Record]:
    """A step with routes replayed and without; the routes of a rollout to the host and back."""
    records, machine = step(works, repeats, small)
    for name, record in zip(works, records, strict=True):
        routes_LBTX = works[name].rollout().routes_LBTX
        if routes_LBTX is None:
            raise UserError("replay: a dense model has no routes; take a config with model.num_experts > 0")
        copied = interleaved({"copy": lambda routes=routes_LBTX: jax.device_put(np.array(routes))}, repeats)["copy"]
        record |= {"routes_bytes": routes_LBTX.nbytes, "routes_copy_seconds": spread(copied)}
    return records, machine


# ---------------------------------------------------------------------------------------------------- its parts


def rollout(works: Works, repeats: int, small: bool) -> tuple[list[Record], Record]:
    """The sampler: seconds, per decode pass too, and the bytes that it has to read."""
    counts: dict[str, list[tuple[int, int]]] = {name: [] for name in works}

    def timed(name: str) -> jax.Array:
        done = works[name].rollout()
        counts[name].append((int(np.sum(done.completion_lengths_B)), int(done.decode_steps)))
        return done.tokens_BT

    seconds, machine = measured({n: functools.partial(timed, n) for n in works}, works, repeats, small)
    records = []
    for name, work in works.items():
        whole, sizes, lengths = spread(seconds[name]), work.sizes(), lengths_of(work)
        tokens, passes = (float(np.mean(column[-repeats:])) for column in zip(*counts[name], strict=True))
        needed = phase_flops(work.spec, sizes, shared=True)["rollout"]
        read = decode_bytes(work.spec, sizes)
        records.append({
            "name": name,
            "seconds": whole,
            "completions": lengths,
            "decode_passes": passes,
            "tokens_per_s": tokens / whole["median"],
            "seconds_per_pass": whole["median"] / passes,
            "bytes_needed": read,
            "bytes_per_s": read / whole["median"],
            "share_of_copy": read / whole["median"] / machine["copy_bytes_per_s"],
            "memory": peak_memory(),
        } | against_product(whole["median"], needed, needed, machine))  # fmt: skip
    return records, machine


def logprob(works: Works, repeats: int, small: bool) -> tuple[list[Record], Record]:
    """The learner's log-probs of given completions."""

    def scored(work: Work) -> Callable:
        rows = work.written()
        return lambda: work.steps.scorer(work.state.policy, rows.tokens_BT, rows.prompt_lengths_B).logp_BC

    seconds, machine = measured({name: scored(work) for name, work in works.items()}, works, repeats, small)
    return [_part_record(name, works[name], "old_logps", seconds[name], machine) for name in works], machine


def update(works: Works, repeats: int, small: bool) -> tuple[list[Record], Record]:
    """All updates of a rollout, on given completions: forward, backward, optimizer, metrics. The optimizer alone, too,
    and the memory of the compiled update."""
    functions, memory = {}, {}
    for name, work in works.items():
        batch = work.batch()
        first = work.steps.minibatches(batch)[0]
        compiled = work.steps.train_step.lower(work.state, first).compile()
        memory[name] = program_memory(compiled)
        work.steps = work.steps._replace(train_step=compiled)  # the same program, compiled once
        functions[name] = functools.partial(work.update, batch)
        functions[f"{name} optimizer"] = _optimizer_alone(work)
    seconds, machine = measured(functions, works, repeats, small)
    records = []
    for name, work in works.items():
        alone = spread(seconds[f"{name} optimizer"])
        record = _part_record(name, work, "update", seconds[name], machine)
        sizes = work.sizes()
        passes = record["seconds"]["median"] - sizes.updates * alone["median"]
        rows, columns = sizes.rows // sizes.updates, sizes.prompt + int(sizes.completion)
        records.append(record | {
            "optimizer_seconds": alone,
            "forward_backward": against_product(passes, record["flops_needed"], record["flops_frames"], machine),
            "program": memory[name],
            "logits_bytes": 4 * rows * columns * work.spec.vocab_size,  # one [B, T, V] float32 array of a minibatch
        })  # fmt: skip
    return records, machine


def _optimizer_alone(work: Work) -> Callable:
    """One update of AdamW, whose gradient is what happens to be at hand: the parameters."""
    optimizer, _ = optimizer_of(work.plan.optimizer)

    @jax.jit
    def alone(params, opt_state):
        updates, opt_state = optimizer.update(params, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return lambda: alone(work.state.params, work.state.opt_state)


def _part_record(name: str, work: Work, phase: str, seconds: list[float], machine: Record) -> Record:
    whole, sizes = spread(seconds), work.sizes()
    needed, frames = (phase_flops(work.spec, sizes, shared=shared)[phase] for shared in (True, False))
    tokens = sizes.rows * sizes.completion
    record = {"name": name, "seconds": whole, "tokens_per_s": tokens / whole["median"], "memory": peak_memory()}
    return record | against_product(whole["median"], needed, frames, machine)


# ---------------------------------------------------------------------------------------------------- smaller pieces


def moe(works: Works, repeats: int, small: bool) -> tuple[list[Record], Record]:
    """One MoE layer of the model, forward and backward, on the tokens of a minibatch, by each backend."""
    work = next(iter(works.values()))
    spec, sizes = work.spec, work.sizes()
    if not spec.num_experts:
        raise UserError("moe: the model is dense; take a config with model.num_experts > 0")
    rows = sizes.rows // sizes.updates
    x_BTD = jax.random.normal(jax.random.key(1), (rows, sizes.prompt + int(sizes.completion), spec.d_model))
    x_BTD = x_BTD.astype(spec.compute_dtype)
    functions = {}
    installed = [name for name in BACKENDS if name != "tokamax" or importlib.util.find_spec(name)]
    for backend in installed:
        layer = MoE(spec.num_experts, spec.experts_per_token, spec.d_expert, spec.norm_topk_prob, backend,
                    spec.compute_dtype, router=spec.router, routed_scale=spec.routed_scale)  # fmt: skip
        params = nn.unbox(jax.jit(layer.init)(jax.random.key(0), x_BTD))
        functions[backend] = functools.partial(jax.jit(jax.grad(_squares, argnums=(1, 2)), static_argnums=0),
                                               layer, params, x_BTD)  # fmt: skip
    seconds, machine = measured(functions, works, repeats, small)
    attention = layer_weights(spec, 0) - spec.d_model * spec.num_experts
    weights = layer_weights(spec, spec.experts_per_token) - attention
    needed = 6 * weights * x_BTD.shape[0] * x_BTD.shape[1]
    records = []
    for backend in installed:
        whole = spread(seconds[backend])
        records.append({"name": backend, "seconds": whole} | against_product(whole["median"], needed, needed, machine))
    return records, machine


def _squares(layer: MoE, params, x_BTD) -> jax.Array:
    return jnp.sum(jnp.square(layer.apply(params, x_BTD)[0].astype(jnp.float32)))


def losses(works: Works, repeats: int, small: bool) -> tuple[list[Record], Record]:
    """Value, gradient and metrics of each preset on given log-probs, as a share of one update of the config's own."""
    work = next(iter(works.values()))
    batch = work.steps.minibatches(work.batch())[0]
    inputs = batch.inputs
    L, X = work.spec.moe_layers or work.spec.num_layers, max(work.spec.experts_per_token, 1)
    inputs = inputs.replace(
        ref_logp_BC=inputs.old_logp_BC,
        router_logp_LBCX=jnp.full((L, *inputs.mask_BC.shape, X), -1.9),
        old_router_logp_LBCX=jnp.full((L, *inputs.mask_BC.shape, X), -2.0),
    )

    def update() -> jax.Array:
        work.state, _ = work.steps.train_step(work.state, batch)
        return work.state.step

    def alone(objective) -> Callable:
        def both(logp_BC):
            def total(logp_BC):
                return objective(inputs.replace(logp_BC=logp_BC, entropy_BC=-logp_BC))[0].total

            return jax.grad(total)(logp_BC), objective(inputs.replace(logp_BC=logp_BC, entropy_BC=-logp_BC))

        return functools.partial(jax.jit(both), inputs.old_logp_BC + 0.01)

    functions = {name: alone(objectives.preset(name)) for name in objectives.OBJECTIVES}
    seconds, machine = measured({"one update": update} | functions, works, repeats, small)
    whole = spread(seconds["one update"])
    records = [{"name": "one update", "seconds": whole, "share_of_update": 1.0}]
    for name in functions:
        own = spread(seconds[name])
        records.append({"name": name, "seconds": own, "share_of_update": own["median"] / whole["median"]})
    return records, machine


CASES = {
    "step": step,
    "rollout": rollout,
    "logprob": logprob,
    "update": update,
    "moe": moe,
    "objectives": losses,
    "replay": replay,
}
