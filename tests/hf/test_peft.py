"""Adapters in PEFT's format: names, shapes, and that they mean what the merged export says."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from gspo.hf import folder as hf
from gspo.hf.peft import export_adapters
from gspo.model.adapters import LoRA, init_adapters, merged_params
from gspo.types import UserError, attached
from tests.hf_folders import all_families, exported, read_all

EXPERT = {"MixtralForCausalLM": "block_sparse_moe.experts.3.w2"}  # the others': mlp.experts.3.down_proj


def random_adapters(spec, params):
    """lora, adapters of every matrix."""
    rng = np.random.default_rng(0)
    lora = LoRA(3, 7.5, "attention/, (mlp|moe)/" + (", router" if spec.num_experts else ""))
    fresh = init_adapters(lora, params, jax.random.key(0))
    return lora, jax.tree.map(lambda x: jnp.asarray(0.1 * rng.standard_normal(x.shape), jnp.float32), fresh)


@all_families
def test_the_modules_of_peft_add_up_to_the_merged_folder(family, tmp_path):
    # Catches A and B swapped or not transposed, layers or experts in another order, a scale other than alpha / r, a
    # module that is missing or that PEFT would look for under another name.
    spec, params, base = exported(tmp_path / "base", family)
    lora, adapters = random_adapters(spec, params)
    count = export_adapters(adapters, lora, spec, tmp_path / "adapter", base="some/model")
    hf.export_params(merged_params(attached(params, adapters), lora.scale), spec, tmp_path / "merged")
    before, after = read_all(base), read_all(tmp_path / "merged")
    tensors = safetensors.numpy.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (3, 7.5, "LORA")

    last = max(layer for layer in range(spec.num_layers) if spec.stack_of(layer) == "blocks")
    query = f"base_model.model.model.layers.{last}.self_attn.q_proj.lora_{{}}.weight"
    width = spec.num_heads * spec.head_width
    assert tensors[query.format("A")].shape == (3, 16) and tensors[query.format("B")].shape == (width, 3)
    if spec.num_experts:
        down = f"base_model.model.model.layers.{last}.{EXPERT.get(family, 'mlp.experts.3.down_proj')}.lora_{{}}.weight"
        assert tensors[down.format("A")].shape == (3, 10) and tensors[down.format("B")].shape == (16, 3)

    modules = {name.rpartition(".lora_")[0] for name in tensors}
    assert len(modules) == count == len(tensors) / 2
    assert {module.rpartition(".")[2] for module in modules} == set(config["target_modules"])
    added = {
        module.removeprefix("base_model.model.") + ".weight": config["lora_alpha"] / config["r"]
        * tensors[f"{module}.lora_B.weight"].astype(np.float64) @ tensors[f"{module}.lora_A.weight"]
        for module in modules
    }  # fmt: skip
    assert added.keys() < after.keys() == before.keys()
    for name, tensor in after.items():
        moved = tensor - before[name].astype(np.float64)
        np.testing.assert_allclose(moved, added.get(name, 0), rtol=0, atol=1e-6, err_msg=name)


def test_a_folder_that_holds_something_is_not_written_to(tmp_path):
    # Catches adapters of one run beside the config of another.
    spec, params, folder = exported(tmp_path, "LlamaForCausalLM")
    lora, adapters = random_adapters(spec, params)
    with pytest.raises(UserError, match="is not empty"):
        export_adapters(adapters, lora, spec, folder)
