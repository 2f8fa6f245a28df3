"""configs/trl_gspo.py against TRL itself: the same model, prompts, completions and rewards, four updates; parameters
are compared after each of them.

    python scripts/benchmark_peers/parity.py --json=experiments/results/trl_parity.json

Needs the environment of TRL, which `compare.py --systems=trl --setup-only` makes; --python names another interpreter.

Prompts are random ids of one length, completions random ids of 4 to 24, so that lengths are unequal. Rewards are of the
order of 100: beside their deviation neither TRL's 1e-4 nor our 1e-6 counts. Both sides see the rows in the order of the
prompts. The recipe's learning rate, 1e-6, hardly moves a policy in four updates: a second run at 1e-3 does, and takes
ratios out of the clip range.
"""

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from safetensors.numpy import load_file

from configs import trl_gspo
from configs.benchmark import DENSE, MOE
from gspo import build
from gspo.hf import folder as hf
from gspo.masked import values
from gspo.report import measure
from gspo.report.workload import Work
from gspo.run import cli
from gspo.types import Rollout, UserError

HERE = Path(__file__).parent
PROMPT, LONGEST, UPDATES = 16, 24, 4
RATES = (1e-6, 1e-3)


def work_of(model: str, rate: float) -> Work:
    """Our side: the parts of a run of configs/trl_gspo.py with a small random model."""
    config = trl_gspo.get_config()
    config.unlock()
    config.task.update(name="random_ids", options=ConfigDict(dict(num_end_ids=0)))
    config.tokenizer = "bytes"  # nobody reads it
    config.model.update({"moe": MOE, "dense": DENSE}[model])
    config.max_prompt_length, config.max_completion_length = PROMPT, LONGEST
    config.optimizer.learning_rate = rate
    config.mesh.data = 1
    return Work(build.rl_plan(config))


def rollout_of(work: Work, seed: int) -> tuple[Rollout, dict[str, Any]]:
    """A rollout nobody sampled, as ours and as lists for TRL."""
    plan, rng = work.plan, np.random.default_rng(seed)
    Q, G = plan.rollout.num_prompts, plan.rollout.num_generations
    B, ids = Q * G, work.spec.vocab_size - 2
    prompts = work.source.batch(0, Q)
    lengths_B = rng.integers(4, LONGEST + 1, B).astype(np.int32)
    completion_BC = rng.integers(0, ids, (B, LONGEST)).astype(np.int32)
    completion_BC = np.where(np.arange(LONGEST) < lengths_B[:, None], completion_BC, work.tokenizer.pad_id)
    rollout = Rollout(
        tokens_BT=np.concatenate([np.repeat(prompts.tokens_QP, G, axis=0), completion_BC], axis=1),
        prompt_lengths_B=np.repeat(prompts.lengths_Q, G),
        completion_lengths_B=lengths_B,
        logp_BC=np.zeros((B, LONGEST), np.float32),  # not read: old_logps is "learner"
        routes_LBTX=None,
        truncated_B=np.zeros(B, bool),
        decode_steps=np.int32(LONGEST),
    )
    told = {
        "prompts": prompts.tokens_QP.tolist(),
        "completions": [row[:n].tolist() for row, n in zip(completion_BC, lengths_B, strict=True)],
        "rewards": np.round(100 * rng.standard_normal(B), 3).tolist(),
    }
    return jax.jit(work.steps.layout.constrain_fields)(rollout), told


def ours(work: Work, rollout: Rollout, rewards: list[float], folder: Path) -> list[dict[str, float]]:
    """Four updates; parameters after each go to folder/ours-1 and so on. The metrics of each."""
    rewards_B = np.asarray(rewards, np.float32)
    batch, _, _ = work.collector.score(work.state, rollout)
    batch = work.collector.compare(work.state, batch, rewards_B, np.zeros(len(rewards_B), bool))
    done, state = [], work.state
    for update, part in enumerate(work.steps.minibatches(batch), start=1):
        state, metrics = work.steps.train_step(state, part)
        done.append({name: float(x) for name, x in values(jax.device_get(metrics)).items() if np.ndim(x) == 0})
        hf.export_params(state.params, work.spec, folder / f"ours-{update}")
    return done


def exported(folder: Path) -> dict[str, np.ndarray]:
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}


def compared(start: dict, mine: dict, theirs: dict, rate: float) -> dict[str, float]:
    """How far two sets of parameters are apart, in terms of what the updates have moved them by."""
    if mine.keys() != theirs.keys():
        raise UserError(f"the parameters have other names: {sorted(mine.keys() ^ theirs.keys())[:3]}")
    apart = np.concatenate([(mine[name] - theirs[name]).ravel() for name in mine]).astype(np.float64)
    moved = np.concatenate([(theirs[name] - start[name]).ravel() for name in mine]).astype(np.float64)
    return {
        "max_difference": float(np.abs(apart).max()),
        "max_difference_in_learning_rates": float(np.abs(apart).max() / rate),
        "share_beyond_a_hundredth_of_the_rate": float((np.abs(apart) > 0.01 * rate).mean()),
        "relative_difference": float(np.linalg.norm(apart) / np.linalg.norm(moved)),
        "max_moved": float(np.abs(moved).max()),
    }


def run(model: str, rate: float, python: Path, seed: int) -> dict[str, Any]:
    """One record: a model at a learning rate."""
    with tempfile.TemporaryDirectory() as name:
        folder, work = Path(name), work_of(model, rate)
        rollout, told = rollout_of(work, seed)
        told |= {
            "vocab_size": work.spec.vocab_size, "moe": model == "moe", "learning_rate": rate,
            "num_generations": work.plan.rollout.num_generations, "max_completion_length": LONGEST,
            "max_steps": work.plan.optimizer.total_steps,
        }  # fmt: skip
        (folder / "work.json").write_text(json.dumps(told))
        hf.export_params(work.state.params, work.spec, folder / "model")
        variables = os.environ | {"PYTHONPATH": ""}
        done = subprocess.run(
            [python, HERE / "trl_parity.py", folder], capture_output=True, text=True, env=variables, cwd=folder
        )
        if done.returncode:
            raise UserError(f"TRL failed:\n{done.stderr[-2000:]}")
        theirs = json.loads((folder / "trl.json").read_text())
        start, metrics = exported(folder / "model"), ours(work, rollout, told["rewards"], folder)
        updates = []
        for update in range(1, UPDATES + 1):
            mine, other = (exported(folder / f"{side}-{update}") for side in ("ours", "trl"))
            log = theirs["logs"][update - 1]
            updates.append(
                compared(start, mine, other, rate)
                | {"loss": [metrics[update - 1]["loss"], log["loss"]]}
                | {"grad_norm": [metrics[update - 1]["grad_norm"], log["grad_norm"]]}
                | {"clipped_sequences": [metrics[update - 1]["clip_ratio/sequences"], log["clip_ratio/region_mean"]]}
            )
        return {"model": model, "learning_rate": rate, "updates": updates, "versions": theirs["versions"]}


def main(arguments: list[str]) -> int:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="dense,moe")
    parser.add_argument("--seed", type=int, default=0, help="of the completions and rewards")
    parser.add_argument("--python", type=Path, default=Path("~/.cache/gspo/peers/trl/bin/python"), help="TRL's")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    options = parser.parse_args(arguments)
    python = options.python.expanduser()
    if not python.exists():
        raise UserError(
            f"--python={python}: there is no such interpreter; make the environment with: python "
            "scripts/benchmark_peers/compare.py --systems=trl --setup-only"
        )
    records = []
    for model in options.models.split(","):
        for rate in RATES:
            records.append(run(model, rate, python, options.seed))
            for update, found in enumerate(records[-1]["updates"], start=1):
                mine, trl = found["clipped_sequences"]
                print(
                    f"{model}, rate {rate:g}, update {update}: apart by {found['max_difference']:.1e}, "
                    f"{found['relative_difference']:.1e} of what moved; clipped {mine:.3f} and {trl:.3f}",
                    flush=True,
                )
    result = {"what": "trl_parity", "records": records, "environment": measure.environment()}
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    cli.run_script(main)
