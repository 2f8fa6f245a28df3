"""Benchmarks. Each prints a table of medians, with ratios that were measured side by side in one process.

python scripts/benchmark.py objectives                    # cost of each loss alone, as a share of a train step
python scripts/benchmark.py backends                      # dense, blocked and ragged MoE layers, with gradients
python scripts/benchmark.py replay                        # a rollout and its updates, with routing replay and without
python scripts/benchmark.py step --model=moe --json=x     # one RL step: 8 x 8 completions of 64 tokens, 4 updates
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gspo import objectives
from gspo.learning.learner import make_train_step
from gspo.learning.microbatch import minibatch
from gspo.learning.optim import make_optimizer
from gspo.learning.sampler import make_sampler
from gspo.learning.scores import make_scorer
from gspo.masked import Mean, masked_mean
from gspo.model.distribution import Sampling
from gspo.model.experts import BACKENDS
from gspo.model.moe import MoE
from gspo.model.routing import route_dtype
from gspo.model.spec import ModelSpec
from gspo.model.transformer import Transformer
from gspo.objectives import advantages
from gspo.types import Batch, LossInputs, TrainState, completion_mask

HEADS = {"num_layers": 4, "num_heads": 4, "num_kv_heads": 2}
EXPERTS = {"num_experts": 8, "experts_per_token": 2}
TOY = ModelSpec(vocab_size=13, d_model=64, head_width=16, d_expert=64, **HEADS, **EXPERTS)
PEER_MOE = ModelSpec(vocab_size=514, d_model=128, head_width=32, d_expert=128, **HEADS, **EXPERTS)
PEER_DENSE = ModelSpec(vocab_size=514, d_model=128, head_width=32, d_ff=256, **HEADS)


def interleaved(functions: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Median seconds of each function, called in turns so that a busy machine slows all of them alike. The first turn
    warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def table(header: tuple[str, ...], rows: list[tuple]) -> None:
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(str(cell) for cell in row)} |")
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {jax.local_device_count()} device(s)")


def toy_batch(rows: int = 128, prompt: int = 13, width: int = 16, routes: bool = True) -> Batch:
    """Random rows of the quickstart's size: 13 prompt columns, 16 completion columns, 13 tokens on average."""
    rng = np.random.default_rng(0)
    lengths_B = jnp.asarray(rng.integers(10, width + 1, rows), jnp.int32)
    mask_BC = completion_mask(lengths_B, width)
    shape = (TOY.num_layers, rows, prompt + width, TOY.experts_per_token)
    return Batch(
        tokens_BT=jnp.asarray(rng.integers(0, TOY.vocab_size, (rows, prompt + width)), jnp.int32),
        prompt_lengths_B=jnp.full((rows,), prompt, jnp.int32),
        completion_lengths_B=lengths_B,
        inputs=LossInputs(
            logp_BC=None,
            mask_BC=mask_BC,
            advantages_BC=jnp.asarray(np.where(mask_BC, rng.normal(size=(rows, 1)), 0), jnp.float32),
            old_logp_BC=jnp.asarray(-rng.exponential(0.5, (rows, width)), jnp.float32),
            ref_logp_BC=jnp.asarray(-rng.exponential(0.5, (rows, width)), jnp.float32),
            old_router_logp_LBCX=jnp.full((TOY.num_layers, rows, width, TOY.experts_per_token), -2.0, jnp.float32),
        ),
        old_routes_LBTX=jnp.asarray(rng.integers(0, TOY.num_experts, shape), jnp.int8) if routes else None,
    )


def fresh_state(model: Transformer, optimizer) -> TrainState:
    params = nn.unbox(model.init_params(jax.random.key(0)))
    return TrainState(jnp.int32(0), params, optimizer.init(params))


def bench_objectives(repeats: int) -> None:
    """Value and gradient of each loss on given log-probs, and a train step whose loss is free (a mean of log-probs)."""
    model, batch = Transformer(TOY), toy_batch()
    optimizer = make_optimizer(learning_rate=1e-4)

    class Free:
        needs = ()
        aggregate = staticmethod(masked_mean)

        def __call__(self, inputs):
            return Mean(jnp.sum(inputs.logp_BC), jnp.float32(inputs.logp_BC.size)), {}

    train_step = make_train_step(model, optimizer, Free())
    holder = [fresh_state(model, optimizer)]

    def train():
        holder[0], _ = train_step(holder[0], batch)
        return holder[0].step

    def loss_alone(name):
        objective = objectives.preset(name)
        inputs = batch.inputs.replace(router_logp_LBCX=batch.inputs.old_router_logp_LBCX + 0.1)

        def both(logp_BC):
            def total(logp_BC):
                return objective(inputs.replace(logp_BC=logp_BC, entropy_BC=-logp_BC))[0].total

            return jax.grad(total)(logp_BC), objective(inputs.replace(logp_BC=logp_BC, ref_logp_BC=None))

        jitted = jax.jit(both)
        logp_BC = inputs.old_logp_BC + 0.01
        return lambda: jitted(logp_BC)

    seconds = interleaved({"train step": train} | {name: loss_alone(name) for name in objectives.OBJECTIVES}, repeats)
    base = seconds.pop("train step")
    rows = [(name, f"{1e3 * value:.3f}", f"{value / base:.2%}") for name, value in seconds.items()]
    table(("preset", "loss, gradient and metrics, ms", f"share of a train step ({1e3 * base:.1f} ms)"), rows)


def bench_backends(repeats: int) -> None:
    """One MoE layer at the quickstart's width, 3456 tokens."""
    x_BTD = jax.random.normal(jax.random.key(1), (128, 27, TOY.d_model))
    functions = {}
    for name in BACKENDS:
        layer = MoE(TOY.num_experts, TOY.experts_per_token, TOY.d_expert, True, name, jnp.float32)
        params = nn.unbox(layer.init(jax.random.key(0), x_BTD))
        grad = jax.jit(jax.grad(lambda p, layer=layer: jnp.sum(layer.apply(p, x_BTD)[0] ** 2)))
        functions[name] = lambda grad=grad, params=params: grad(params)
    seconds = interleaved(functions, repeats)
    fastest = min(seconds.values())
    table(
        ("backend", "forward and backward, ms", "ratio"),
        [(n, f"{1e3 * s:.1f}", f"{s / fastest:.2f}") for n, s in seconds.items()],
    )


def rl_step(spec: ModelSpec, *, prompts: int, group: int, prompt: int, width: int, updates: int, replay: bool = False):
    """One whole step on random prompts: rollout, reward, old log-probs by the learner, updates. Returns (function, its
    phases)."""
    model = Transformer(spec)
    optimizer = make_optimizer(learning_rate=1e-5)
    eos, pad = spec.vocab_size - 2, spec.vocab_size - 1
    sampler = make_sampler(model, num_generations=group, max_completion_length=width, eos_ids=(), pad_id=pad)
    scorer = make_scorer(model, completion_width=width, sampling=Sampling(), chunk=128)
    train_step = make_train_step(model, optimizer, objectives.preset("gspo"))
    rng = np.random.default_rng(0)
    prompt_QP = jnp.asarray(rng.integers(0, eos, (prompts, prompt)), jnp.int32)
    lengths_Q = jnp.full((prompts,), prompt, jnp.int32)
    state, phases, count = [fresh_state(model, optimizer)], {"rollout": [], "old log-probs": [], "update": []}, [0]

    def clock(phase, start, value):
        jax.block_until_ready(value)
        phases[phase].append(time.perf_counter() - start)

    def one():
        count[0] += 1
        start = time.perf_counter()
        rollout = sampler(state[0].params, prompt_QP, lengths_Q, jax.random.key(count[0]))
        rewards_B = (np.asarray(rollout.tokens_BT)[:, prompt:] % 2 == 0).mean(axis=1)
        clock("rollout", start, rollout)
        start = time.perf_counter()
        scores = scorer(state[0].params, rollout.tokens_BT, rollout.prompt_lengths_B)
        clock("old log-probs", start, scores)
        start = time.perf_counter()
        advantages_B = advantages.group_relative(jnp.asarray(rewards_B, jnp.float32), group)
        mask_BC = completion_mask(rollout.completion_lengths_B, width)
        batch = Batch(
            rollout.tokens_BT, rollout.prompt_lengths_B, rollout.completion_lengths_B,
            LossInputs(None, scores.logp_BC, jnp.broadcast_to(advantages_B[:, None], mask_BC.shape), mask_BC),
            old_routes_LBTX=rollout.routes_LBTX, replayed_routes_LBTX=rollout.routes_LBTX if replay else None,
        )  # fmt: skip
        for j in range(updates):
            state[0], _ = train_step(state[0], minibatch(batch, j, updates))
        clock("update", start, state[0])
        return state[0].step

    return one, phases


def bench_replay(repeats: int) -> None:
    """The quickstart's rollout and updates, routes replayed or not."""
    sizes = {"prompts": 64, "group": 8, "prompt": 13, "width": 16, "updates": 4}
    seconds = interleaved({"free": rl_step(TOY, **sizes)[0], "replay": rl_step(TOY, **sizes, replay=True)[0]}, repeats)
    rows = [(name, f"{value:.3f}", f"{value / seconds['free'] - 1:+.1%}") for name, value in seconds.items()]
    table(("routing", "s per rollout and 4 updates", "against free"), rows)
    routes = jnp.zeros((TOY.num_layers, 64 * 8, 13 + 16, TOY.experts_per_token), route_dtype(TOY.num_experts))
    copied = interleaved({"copy": lambda: jax.device_put(np.array(routes))}, repeats)["copy"]
    print(
        f"routes: {routes.dtype}, {routes.nbytes / 1024:.0f} KiB per rollout of {64 * 8} rows; to the host and back "
        f"{1e3 * copied:.2f} ms, {copied / seconds['free']:.2%} of a rollout and its updates"
    )


def bench_step(repeats: int, model: str, path: str | None) -> None:
    """8 prompts of 32 tokens, 8 completions of 64 tokens each, 4 updates of 16 rows: float32, AdamW, clip 1.0."""
    began = time.perf_counter()
    one, phases = rl_step(
        PEER_MOE if model == "moe" else PEER_DENSE, prompts=8, group=8, prompt=32, width=64, updates=4
    )
    jax.block_until_ready(one())
    first = time.perf_counter() - began
    seconds = interleaved({"step": one}, repeats)["step"]
    result = {"system": "gspo", "model": model, "step": seconds, "first_step_with_compile": first}
    result |= {phase: statistics.median(values[2:]) for phase, values in phases.items()}
    table(("model", "step, s", *phases), [(model, f"{seconds:.3f}", *(f"{result[phase]:.3f}" for phase in phases))])
    if path:
        with open(path, "w") as file:
            json.dump(result, file)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("objectives", "backends", "replay", "step"))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--model", choices=("moe", "dense"), default="moe")
    parser.add_argument("--json", help="step: write the figures there")
    options = parser.parse_args(argv)
    if options.what == "step":
        bench_step(options.repeats, options.model, options.json)
    else:
        {"objectives": bench_objectives, "backends": bench_backends, "replay": bench_replay}[options.what](
            options.repeats
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
