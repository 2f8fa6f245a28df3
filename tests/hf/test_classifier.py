"""Reward models as sequence classifiers of one label: out and in again, and the scores of transformers' own."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from gspo.hf.classifier import export_reward_model, import_reward_model, is_classifier
from gspo.hf.families import read_config, spec_from_hf
from gspo.learning.critic import Critic
from gspo.learning.rewards import CompletionRows, make_reward_fn
from gspo.model.transformer import abstract_params
from gspo.types import UserError
from tests import model_oracle as oracle
from tests.hf_folders import SPECS, TINY, assert_bit_equal, needs_transformers


def reward_model(spec):
    """Random parameters of a reward model of that spec."""
    _, body = oracle.build(spec)
    value = np.random.default_rng(1).standard_normal(spec.d_model).astype(np.float32)
    return {"body": {name: leaf for name, leaf in body.items() if name != "head"}, "value": jnp.asarray(value)}


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("LlamaForCausalLM", "Qwen3MoeForCausalLM")]


@pytest.mark.parametrize("family", ["Qwen3ForCausalLM", *SLOW])
def test_export_and_import_is_the_identity(family, tmp_path):
    # Catches a head in the folder, a score that is transposed or lost, a config of the language model, an index without
    # the score.
    spec = SPECS[family]
    params = reward_model(spec)
    export_reward_model(params, spec, tmp_path / "out", pad_id=3, shard_bytes=5_000)
    config = read_config(tmp_path / "out")
    assert config["architectures"] == [family.replace("ForCausalLM", "ForSequenceClassification")]
    assert is_classifier(config) and config["id2label"] == {"0": "LABEL_0"} and config["pad_token_id"] == 3
    assert config["tie_word_embeddings"] == spec.tie_embeddings
    weight_map = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert "score.weight" in weight_map and "lm_head.weight" not in weight_map
    for file in set(weight_map.values()):
        held = safetensors.numpy.load_file(tmp_path / "out" / file)
        assert held.keys() == {name for name, where in weight_map.items() if where == file}
    again = spec_from_hf(config, moe_backend="dense")
    assert_bit_equal(import_reward_model(tmp_path / "out", again, abstract_params(Critic(again))), params)
    export_reward_model(params, spec, tmp_path / "again", source=tmp_path / "out")  # from whose config.json it begins
    assert read_config(tmp_path / "again") == config


def test_a_classifier_of_several_labels_is_refused(tmp_path):
    # Catches the first label taken for a reward.
    export_reward_model(reward_model(TINY), TINY, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    file = tmp_path / "out" / index["weight_map"]["score.weight"]
    tensors = safetensors.numpy.load_file(file) | {"score.weight": np.zeros((3, 16), np.float32)}
    safetensors.numpy.save_file(tensors, file)
    with pytest.raises(UserError, match=r"score.weight is \[3, 16\], where \[1, 16\] is wanted"):
        import_reward_model(tmp_path / "out", TINY, abstract_params(Critic(TINY)))


@needs_transformers
@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_scores_agree_with_transformers_and_it_loads_what_is_exported(family, tmp_path):
    # Catches a score before the final norm, or of another token than the last; an export that only we understand.
    import torch
    import transformers

    config = getattr(transformers, f"{family}Config")(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, max_position_embeddings=64, bos_token_id=None, eos_token_id=None,
        pad_token_id=39, num_labels=1, tie_word_embeddings=False,
    )  # fmt: skip
    model = getattr(transformers, f"{family}ForSequenceClassification")(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.2 * noise if p.ndim == 1 else noise * p.shape[-1] ** -0.5 * 1.5)
    model.save_pretrained(tmp_path / "theirs")
    spec = spec_from_hf(read_config(tmp_path / "theirs"))
    params = import_reward_model(tmp_path / "theirs", spec, abstract_params(Critic(spec)))
    rng, P, C = np.random.default_rng(0), 8, 10
    prompts, lengths = np.array([8, 5, 3, 1], np.int32), np.array([10, 7, 1, 4], np.int32)
    tokens, expected = np.full((4, P + C), 39, np.int32), []
    for b in range(4):
        ids = rng.integers(0, 39, prompts[b] + lengths[b])
        tokens[b, P - prompts[b] : P + lengths[b]] = ids
        with torch.no_grad():
            expected.append(model(torch.tensor(ids)[None]).logits.item())
    found = make_reward_fn(Critic(spec), completion_width=C)(params, CompletionRows(tokens, prompts, lengths))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    export_reward_model(jax.device_get(params), spec, tmp_path / "ours", source=tmp_path / "theirs")
    again, info = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True, dtype=torch.float32)
    assert not any(info.values()), info
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
