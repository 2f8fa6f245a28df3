"""Adapters out, in the format of PEFT: adapter_model.safetensors and adapter_config.json, for the Hugging Face folder
of the weights under them. The names of modules are those of the family's tensors (`gspo.hf.families`); of experts,
which lie stacked in ours, each has a module of its own.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict

from gspo.hf.families import table
from gspo.model.adapters import LoRA
from gspo.model.spec import ModelSpec
from gspo.parallel import distributed
from gspo.types import Params, UserError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FACTORS = {"A": "lora_A", "B": "lora_B"}


def export_adapters(
    adapters: Params, lora: LoRA, spec: ModelSpec, out: str | Path, *, dtype: str = "float32", base: str | None = None
) -> int:
    """Writes a folder that `PeftModel.from_pretrained(model, out)` loads; returns the number of adapted modules.

    adapters: as `gspo.model.adapters.init_adapters` lays them out, of one or many devices; every process must call.
    Theirs are [r, in] and [out, r], and their scale is ours, alpha / r. base: the name or folder of the model under
    them, which PEFT may load by itself. Raises UserError if `out` is not an empty or new folder, or cannot be written.
    """
    out, kind = Path(out), np.dtype(jnp.dtype(dtype))
    tensors = _tensors(distributed.fetch(adapters), spec, kind)
    modules = sorted({name.rpartition(".lora_")[0] for name in tensors})
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise UserError(f"{out} is not empty: choose another folder")
        distributed.barrier("export: all have seen the empty folder")
        if distributed.is_primary():
            config = _config(lora, sorted({name.rpartition(".")[2] for name in modules}), base)
            safetensors.numpy.save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
            (out / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
            shutil.copymode(out / CONFIG, out / WEIGHTS)  # the library's are for their owner only
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}") from None
    return len(modules)


def _tensors(adapters: Params, spec: ModelSpec, kind: np.dtype) -> dict[str, np.ndarray]:
    """{"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": [r, in]} and so on."""
    leaves, tensors = flatten_dict(adapters, sep="/"), {}
    for row in table(spec):
        for ours, theirs in FACTORS.items():
            leaf = leaves.pop(f"{row.path}/{ours}", None)
            for at in () if leaf is None else row.positions(leaf.shape):
                name = f"base_model.model.{row.tensor(at).removesuffix('.weight')}.{theirs}.weight"
                tensors[name] = np.ascontiguousarray(np.asarray(leaf[at]).T.astype(kind))
    assert not leaves, f"the table of this family has no {', '.join(leaves)}"
    return tensors


def _config(lora: LoRA, modules: list[str], base: str | None) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,
        "target_modules": modules,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
