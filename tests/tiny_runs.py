"""Runs small enough for tests of the loops: their configs, and fixtures that make them quick.

Import the fixtures by name: `kept_compiles` takes effect by that alone.
"""

import json
import os
import runpy
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from configs import base
from gspo import build, evaluate, rl, steps
from gspo.data.tokenizer import Tokenizer, make_tokenizer
from gspo.model.transformer import Transformer
from gspo.parallel.sharding import Layout
from gspo.plans import RunPlan
from gspo.run import cli  # noqa: F401 - cli brings absl's own flags, which `command` leaves alone
from gspo.run.checkpoint import Checkpointer
from gspo.steps import make_layout, make_model
from gspo.types import Rollout, TrainState

ROOT = Path(__file__).parent.parent


# ---------------------------------------------------------------------------- configs


def common(config: ConfigDict, folder: Path, changes: dict) -> ConfigDict:
    """Prompts such as "0=" and "011=", of which the answer is the last digit: an untrained policy finds it now and
    then."""
    data = Path(folder) / "digits.jsonl"
    if not data.exists():
        prompts = [f"{i:0{length}b}" for length in (1, 2, 3) for i in range(2**length)]
        data.write_text(
            "".join(json.dumps({"prompt": p + "=", "answer": p[-1], "demonstration": p[-1]}) + "\n" for p in prompts)
        )
    config.task.name = f"jsonl:{data}"
    config.task.eval_split = config.task.train_split  # the same few prompts, on purpose
    config.task.options = ConfigDict()
    config.tokenizer = "chars:01 ="
    config.max_prompt_length = 4
    config.max_completion_length = 6
    config.model.update(num_layers=1, d_model=16, num_heads=2, num_kv_heads=1, head_width=8, num_experts=4, d_expert=8)
    config.model.moe_backend = "dense"  # the quickest to compile
    config.eval.update(every=2, num_prompts=4)
    if "num_generations_eval" in config.eval:
        config.eval.num_generations_eval = 4
    config.checkpoint.update(every=1, keep_last=2, keep_best=False)
    config.mesh.data = 1
    config.update_from_flattened_dict(changes)
    return config


def rl_config(folder: Path, **changes) -> ConfigDict:
    """3 rollouts of 4 x 4 completions, 2 updates each. changes: **{"a.b": value}; so are those of the others."""
    config = base.rl()
    config.update(num_rollouts=3, num_prompts=4, num_generations=4, updates_per_rollout=2, rewards=("numeric_answer",))
    config.log.samples_every = 1
    config.eval.reward = "exact_match"
    return common(config, folder, changes)


def stateful_config(folder: Path, **changes) -> ConfigDict:
    """4 rollouts with all that a run can carry from one to the next: optimizer, reference, adaptive bonus, a data
    position that depends on the rewards, the best checkpoint. No field is without effect."""
    return rl_config(folder, **{
        "seed": 1, "num_rollouts": 4, "checkpoint.every": 2, "checkpoint.keep_best": True,
        "optimizer.learning_rate": 0.01, "optimizer.schedule": "cosine", "optimizer.warmup_steps": 2,
        "objective.beta": 0.01, "sync_ref_model": True, "ref_model_sync_steps": 1, "entropy_target": 2.0,
        "filter_groups.enable": True, "filter_groups.max_num_gen_batches": 3, "overlong_buffer.len": 2,
        "model.moe_backend": "blocked", "critic.enable": True, "old_logps": "learner",
        "mismatch.stale_rollouts": 1, "log.router_kl": True, "num_iterations": 2,
    } | changes)  # fmt: skip


def sft_config(folder: Path, **changes) -> ConfigDict:
    """30 updates of 8 demonstrations: enough to learn the task."""
    config = base.sft()
    config.update(num_updates=30, batch_size=8)
    return common(config, folder, {
        "optimizer.learning_rate": 0.02, "optimizer.schedule": "cosine", "eval.every": 5, "checkpoint.every": 10,
        "log.num_samples": 3,
    } | changes)  # fmt: skip


def pair_data(folder: Path) -> str:
    """Pairs to the prompts of `common`, as a task's name: a text that begins with a 1 is preferred to one that begins
    with a 0. The last pair is of equal texts."""
    data = Path(folder) / "pairs.jsonl"
    if not data.exists():
        prompts = [f"{i:0{length}b}" for length in (1, 2, 3) for i in range(2**length)]
        texts = [(p, f"1{more}", f"0{more}") for p in prompts for more in ("", "0", "11", " 1=")]
        rows = [{"prompt": f"{p}=", "chosen": good, "rejected": bad} for p, good, bad in texts + [("0", "1", "1")]]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"jsonl:{data}"


def pairs_config(config: ConfigDict, folder: Path, changes: dict) -> ConfigDict:
    """What is common to training on preferences: 40 updates of 8 pairs."""
    common(config, folder, {})
    config.eval.update(every=10, num_prompts=20)
    config.task.name = pair_data(folder)
    config.model.update(num_experts=0, d_ff=16)  # the quickest to compile
    config.update(num_updates=40, batch_size=8)
    config.optimizer.update(learning_rate=0.01, schedule="cosine")
    config.checkpoint.every = 20
    config.update_from_flattened_dict(changes)
    return config


def reward_model_config(folder: Path, **changes) -> ConfigDict:
    return pairs_config(base.reward_model(), folder, {"center_rewards_coefficient": 0.01} | changes)


def dpo_config(folder: Path, **changes) -> ConfigDict:
    return pairs_config(base.dpo(), folder, changes)


def written(texts_QG, tokenizer, prompt_QP, prompt_lengths_Q, *, width=6, truncated=()) -> Rollout:
    """The rollout in which completion g of prompt q is texts_QG[q][g]; an end-of-sequence token follows unless it is in
    `truncated`."""
    texts = [text for group in texts_QG for text in group]
    rows = [tokenizer.encode(text) + ([] if text in truncated else [tokenizer.eos_ids[0]]) for text in texts]
    tokens_BC = np.array([row + [tokenizer.pad_id] * (width - len(row)) for row in rows])
    lengths_B = np.array([len(row) for row in rows])
    B, G = len(rows), len(texts_QG[0])
    return Rollout(
        tokens_BT=np.concatenate([np.repeat(np.asarray(prompt_QP), G, axis=0), tokens_BC], axis=1),
        prompt_lengths_B=np.repeat(np.asarray(prompt_lengths_Q), G),
        completion_lengths_B=lengths_B,
        logp_BC=np.where(np.arange(width) < lengths_B[:, None], -np.arange(1.0, B + 1)[:, None], 0.0).astype(
            np.float32
        ),
        routes_LBTX=None,
        truncated_B=np.array([text in truncated for text in texts]),
        decode_steps=np.int32(lengths_B.max()),
    )


# ---------------------------------------------------------------------------- results


def parts_of(config: ConfigDict) -> tuple[RunPlan, Tokenizer, Layout, Transformer]:
    """Plan, tokenizer, layout and model of a run."""
    plan = build.run_plan(config)
    tokenizer, layout = make_tokenizer(plan.data.tokenizer), make_layout(plan.mesh)
    return plan, tokenizer, layout, make_model(plan.model, tokenizer, layout)


def patch_samplers(patch: pytest.MonkeyPatch, make) -> None:
    """Every sampler is made by make(*arguments of `steps.sampler_of`)."""
    for module in (steps, evaluate):
        patch.setattr(module, "sampler_of", make)


def state_of(config: ConfigDict, workdir: Path) -> tuple[int, TrainState]:
    """(step, state) of the last checkpoint of a run of `rl.train`."""
    with Checkpointer(workdir, keep_last=9) as checkpointer:
        step, state, _ = checkpointer.restore(rl.prepare(build.rl_plan(config)).steps.abstract.saved)
    return step, state


def assert_bit_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, g), w in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert np.asarray(g).tobytes() == np.asarray(w).tobytes(), jax.tree_util.keystr(path)


def contents(folder: Path) -> dict[str, bytes]:
    """{relative path: bytes} of all files, empty folders included."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
    }


# ---------------------------------------------------------------------------- fixtures


@pytest.fixture(autouse=True, scope="module")
def kept_compiles(tmp_path_factory):
    """Each run compiles its own steps, mostly the same ones: they are kept until pytest ends, for child processes too
    (by the environment)."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder  # one for all processes
    wanted = {
        "jax_compilation_cache_dir": str(folder / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: jax.config.values[name] for name in wanted}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in wanted.items():
            jax.config.update(name, value)
            patch.setenv(name.upper(), str(value))
        compilation_cache.reset_cache()  # jax decides once per process whether there is a cache
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def command(monkeypatch, capfd):
    """command("rl", *arguments) -> (exit code, stdout, stderr) of experiments/rl.py, run in this process. folder:
    another place."""

    def run(script: str, *arguments: str, folder: str = "experiments") -> tuple[int, str, str]:
        path = str(ROOT / folder / f"{script}.py")
        monkeypatch.setattr(sys, "argv", [path, *map(str, arguments)])
        known = set(flags.FLAGS)
        capfd.readouterr()
        try:
            with pytest.raises(SystemExit) as stopped:
                runpy.run_path(path, run_name="__main__")
        finally:
            for name in set(flags.FLAGS) - known:
                delattr(flags.FLAGS, name)
            flags.FLAGS.unparse_flags()
        return stopped.value.code, *capfd.readouterr()

    return run
