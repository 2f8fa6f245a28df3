"""Runs small enough for tests of the loops: their configs, and a fixture that makes their compilations quick and keeps them."""

import json
import os
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from configs import base

CACHE = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0"}


@pytest.fixture(autouse=True, scope="module")
def kept_compiles(tmp_path_factory):
    """Every run compiles its own steps, mostly the same ones: they are kept in a folder of the session, for child processes too
    (by the environment). LLVM's optimisations, which would cost more than they save, are off."""
    wanted = {name: json.loads(value) for name, value in CACHE.items()} | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.getbasetemp() / "compiled"),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": True,
    }
    before = {name: jax.config.read(name.lower()) for name in wanted}
    for name, value in wanted.items():
        jax.config.update(name.lower(), value)
        os.environ[name] = str(value)
    compilation_cache.reset_cache()  # jax decides once per process whether there is a cache
    yield
    for name, value in before.items():
        jax.config.update(name.lower(), value)
        del os.environ[name]
    compilation_cache.reset_cache()


def common(config: ConfigDict, folder: Path, **changes) -> ConfigDict:
    """Prompts such as "0=" and "011=", of which the answer is the last digit; an untrained policy finds it now and then."""
    data = Path(folder) / "digits.jsonl"
    if not data.exists():
        prompts = [f"{i:0{length}b}" for length in (1, 2, 3) for i in range(2**length)]
        lines = [json.dumps({"prompt": p + "=", "answer": p[-1], "demonstration": p[-1]}) for p in prompts]
        data.write_text("\n".join(lines) + "\n")
    config.task.update(name=f"jsonl:{data}")
    config.task.options = ConfigDict()
    config.tokenizer = "chars:01 ="
    config.max_prompt_length = 4
    config.max_completion_length = 6
    config.model.update(num_layers=1, d_model=16, num_heads=2, num_kv_heads=1, head_width=8, num_experts=4, d_expert=8)
    config.eval.update(every=2, num_prompts=4, num_generations_eval=4)
    config.checkpoint.update(every=1, keep_last=2, keep_best=False)
    config.log.samples_every = 1
    config.mesh.data = 1
    config.update_from_flattened_dict(changes)
    return config


def rl_config(folder: Path, **changes) -> ConfigDict:
    """3 rollouts of 4 x 4 completions, 2 updates each. changes: **{"a.b": value}."""
    config = base.rl()
    config.update(num_rollouts=3, num_prompts=4, num_generations=4, updates_per_rollout=2, rewards=("numeric_answer",))
    return common(config, folder, **changes)


def sft_config(folder: Path, **changes) -> ConfigDict:
    """4 updates of 4 demonstrations."""
    config = base.sft()
    config.update(num_updates=4, batch_size=4)
    return common(config, folder, **changes)
