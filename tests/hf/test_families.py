"""Which config.json describes which model, and which none that we compute; configs/models.py."""

import dataclasses
import json
import math

import jax
import pytest

from configs import base, models
from gspo import build
from gspo.data.tokenizer import CharTokenizer
from gspo.hf.families import FAMILIES, family_of, hf_config, spec_from_hf
from gspo.model.spec import TOY, ModelSpec
from gspo.model.transformer import Transformer, abstract_params
from gspo.steps import make_model
from gspo.types import UserError
from tests.hf_folders import SPECS, TINY, TINY_MOE, all_families


def published(**changes):
    """config.json of a published Qwen3-30B-A3B, as far as it describes the model, in the style of transformers 4."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "decoder_sparse_step": 1,
        "eos_token_id": 151643,
        "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768,
        "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_sliding_window": False, "vocab_size": 151936,
    } | changes  # fmt: skip


def spec_of(name: str) -> ModelSpec:
    fields = TOY | {field: value for field, value in models.model(name).to_dict().items() if value is not None}
    return ModelSpec(**fields | {"vocab_size": fields["vocab_size"] or 8192})


def test_a_published_config_describes_the_model_of_that_name():
    # Catches a constant copied wrongly, and a key that is read under another name.
    assert spec_from_hf(published(), dtype="bfloat16", moe_backend="ragged", remat=True) == spec_of("qwen3-30b-a3b")
    assert not spec_from_hf(published() | {"norm_topk_prob": False}).norm_topk_prob
    without = {
        key: value for key, value in published().items() if key not in ("norm_topk_prob", "num_experts", "head_dim")
    }
    spec = spec_from_hf(without | {"num_local_experts": 128})  # transformers 5 writes this name
    assert (spec.norm_topk_prob, spec.num_experts, spec.head_width) == (False, 128, 64)


@pytest.mark.parametrize(("changes", "words"), [
    (dict(architectures=["GPT2LMHeadModel"]), "Qwen3ForCausalLM, Qwen3MoeForCausalLM, MixtralForCausalLM, "
                                              "LlamaForCausalLM, Olmoe"),
    (dict(mlp_bias=True), "mlp_bias"), (dict(hidden_act="gelu"), "hidden_act"),
    (dict(mlp_only_layers=list(range(48))), "dense_layers"), (dict(decoder_sparse_step=0), "decoder_sparse_step"),
    (dict(sliding_window=4096, use_sliding_window=True), "sliding_window"),
    (dict(rope_scaling={"rope_type": "longrope", "factor": 4.0}), "longrope"),
    (dict(rope_scaling={"type": "yarn"}), "'yarn' needs 'factor'"),
    (dict(rope_scaling={"type": "linear", "factor": -1}), "do not fit"),
    (dict(rope_scaling={"type": "llama3", "factor": 4.0}), "low_freq"),
    (dict(quantization_config={"bits": 4}), "quantization_config"), (dict(num_attention_heads=30), "num_heads"),
])  # fmt: skip
def test_a_config_that_we_do_not_compute_is_an_error_and_never_an_approximation(changes, words):
    # Catches a model that loads and is subtly wrong: sliding windows, dense layers among the experts, other rotary
    # rules.
    with pytest.raises(UserError, match=words):
        spec_from_hf(published(**changes))


@pytest.mark.parametrize(("changes", "words"), [
    (dict(n_group=8), "n_group=8"), (dict(topk_group=4), "topk_group=4"),
    (dict(scoring_func="softmax"), "scoring_func"),
    (dict(n_shared_experts=None), "n_shared_experts"), (dict(max_window_layers=1), "sliding_window"),
    (dict(layer_types=["full_attention", "sliding_attention"]), "sliding_window"),
])  # fmt: skip
def test_a_sigmoid_router_that_is_limited_to_groups_or_has_no_shared_expert_is_refused(changes, words):
    # Catches routes that are chosen among too many experts, and a window that is seen through.
    spec_from_hf(hf_config(SPECS["Dots1ForCausalLM"]) | dict(scoring_func="noaux_tc"))  # as its release calls it
    config = hf_config(SPECS["Dots1ForCausalLM"]) | dict(sliding_window=4096, max_window_layers=3, n_group=1)
    assert spec_from_hf(config, moe_backend="dense") == SPECS["Dots1ForCausalLM"]
    assert config["n_shared_experts"] == 2 and config["routed_scaling_factor"] == 2.5
    with pytest.raises(UserError, match=words) as error:
        spec_from_hf(config | changes)
    assert "\n" not in str(error.value)


def test_a_config_without_a_needed_key_names_it():
    # Catches a KeyError, and a silent default for something that no default can know.
    config = published()
    del config["moe_intermediate_size"]
    with pytest.raises(UserError, match="moe_intermediate_size"):
        spec_from_hf(config)


YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(("rope", "scaling"), [
    (YARN | {"rope_type": "yarn"}, ("yarn", 4.0, 32768.0)), (YARN | {"type": "yarn"}, ("yarn", 4.0, 32768.0)),
    (YARN | {"type": "yarn", "beta_slow": 2}, ("yarn", 4.0, 32768.0, 32.0, 2.0)),
    (YARN | {"type": "yarn", "attention_factor": 1.5}, ("yarn", 4.0, 32768.0, 32.0, 1.0, 1.5)),
    (YARN | {"type": "yarn", "truncate": False}, ("yarn", 4.0, 32768.0, 32.0, 1.0, None, False)),
    (YARN | {"type": "yarn", "factor": None}, ("yarn", 40960 / 32768, 32768.0)),
    ({"type": "yarn", "factor": 2.0}, ("yarn", 2.0, 40960.0)),
    (YARN | {"type": "yarn", "mscale": 2.0, "mscale_all_dim": 1.0},
     ("yarn", 4.0, 32768.0, 32.0, 1.0, (1 + 0.2 * math.log(4)) / (1 + 0.1 * math.log(4)))),
    ({"type": "linear", "factor": 2}, ("linear", 2.0)), ({"rope_type": "default"}, ()),
])  # fmt: skip
def test_rotary_rules_are_read_as_transformers_reads_them_and_survive_an_export(rope, scaling):
    # Catches a default that is ours and not theirs: the trained length, a factor of null, the two mscales.
    spec = spec_from_hf(published(rope_scaling=rope))
    assert spec.rope_scaling == pytest.approx(scaling) if len(scaling) == 6 else spec.rope_scaling == scaling
    assert spec_from_hf(json.loads(json.dumps(hf_config(spec)))) == spec


@pytest.mark.parametrize(("changes", "dense"), [
    (dict(mlp_only_layers=[3, 0]), (0, 3)), (dict(decoder_sparse_step=3), (0, 1, 3, 4, 6, 7)),
    (dict(decoder_sparse_step=4, mlp_only_layers=[3, 90]), (0, 1, 2, 3, 4, 5, 6)),
])  # fmt: skip
def test_dense_layers_in_between_are_those_of_transformers_and_survive_an_export(changes, dense):
    # Catches a step that counts from the first layer, a list that is added to it wrongly, and their width.
    spec = spec_from_hf(published(num_hidden_layers=8, **changes))
    assert (spec.dense_layers, spec.d_ff, spec.moe_layers) == (dense, 6144, 8 - len(dense))
    assert spec_from_hf(json.loads(json.dumps(hf_config(spec, base=published(**changes))))) == spec
    with pytest.raises(UserError, match="no Hugging Face architecture"):
        family_of(dataclasses.replace(spec, qk_norm_over="projection"))
    with pytest.raises(UserError, match=next(iter(changes))):
        spec_from_hf(hf_config(SPECS["OlmoeForCausalLM"]) | changes)


@all_families
def test_a_spec_knows_its_family_and_survives_its_config(family):
    # Catches an export under another architecture's name, whose router or norm would differ.
    assert family_of(SPECS[family]) == family
    assert spec_from_hf(hf_config(SPECS[family]), moe_backend="dense") == SPECS[family]
    assert SPECS.keys() == FAMILIES.keys()


def test_a_config_to_start_from_gives_what_still_holds_of_the_model():
    # Catches a MoE that cannot be exported since it began dense, and one that says it is packed in 8 bits, or that has
    # kinds of more layers than layers.
    ids = dict(eos_token_id=[7, 8], bos_token_id=5, max_position_embeddings=99)
    dense = hf_config(SPECS["LlamaForCausalLM"]) | ids | dict(mlp_bias=False, pretraining_tp=1)
    moe = hf_config(SPECS["MixtralForCausalLM"], base=dense)
    assert moe == hf_config(SPECS["MixtralForCausalLM"]) | ids
    packed = dict(quantization_config={"quant_method": "fp8"}, auto_map={"AutoModel": "code.Model"}, use_cache=False)
    larger = dense | packed | dict(layer_types=["full_attention"] * 28)
    own = hf_config(SPECS["LlamaForCausalLM"], base=larger)
    kinds = ["full_attention"] * SPECS["LlamaForCausalLM"].num_layers
    assert own == dense | dict(use_cache=False, layer_types=kinds)
    assert spec_from_hf(own, moe_backend="dense") == SPECS["LlamaForCausalLM"]


def test_a_part_of_the_head_is_rotated_where_the_family_says_so_and_refused_elsewhere():
    # Catches the share read from one of its two places alone, and a Qwen that is rotated in part without saying so.
    config = hf_config(SPECS["Glm4MoeForCausalLM"])
    assert config["num_nextn_predict_layers"] == 0 and config["partial_rotary_factor"] == 4 / 6
    del config["partial_rotary_factor"]
    assert spec_from_hf(config | dict(head_dim=8)).rotary_width == 4  # half of it, unless it says
    inside = dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=1.0)
    assert spec_from_hf(config | dict(rope_parameters=inside)).rotary_width == 0
    for changes in (dict(partial_rotary_factor=0.5), dict(rope_parameters=inside | dict(partial_rotary_factor=0.5))):
        with pytest.raises(UserError, match=r"partial_rotary_factor=0\.5"):
            spec_from_hf(published(**changes))


def test_biases_of_attention_are_read_where_the_family_may_have_them():
    # Catches a bias that is dropped in silence: Qwen3 and Llama have it on all four projections, Qwen2 always on three.
    for attention_bias in (True, False, None):
        spec = spec_from_hf(published(attention_bias=attention_bias))
        assert spec.qkv_bias == spec.out_bias == bool(attention_bias)
    biased = dataclasses.replace(TINY, qk_norm=False, qkv_bias=True, out_bias=True)
    assert hf_config(biased)["attention_bias"] is True and family_of(biased) == "LlamaForCausalLM"
    assert family_of(dataclasses.replace(biased, out_bias=False)) == "Qwen2ForCausalLM"
    with pytest.raises(UserError, match="attention_bias"):
        spec_from_hf(hf_config(SPECS["MixtralForCausalLM"]) | {"attention_bias": True})


def test_a_spec_of_no_family_is_a_one_line_error():
    # Catches an export that drops what makes the model different.
    plain_moe = dataclasses.replace(TINY_MOE, qk_norm=False, norm_topk_prob=False)
    one_bias = dataclasses.replace(TINY, qkv_bias=True)
    uneven = dataclasses.replace(SPECS["Dots1ForCausalLM"], d_shared=15)  # no whole number of experts
    scaled = dataclasses.replace(TINY_MOE, routed_scale=2.0)
    last_dense = dataclasses.replace(SPECS["Dots1ForCausalLM"], dense_layers=(1,), d_ff=8)
    wide = dataclasses.replace(SPECS["OlmoeForCausalLM"], head_width=SPECS["OlmoeForCausalLM"].head_width + 2)
    for odd in (
        dataclasses.replace(TINY, qk_norm_over="projection"),
        wide,
        plain_moe,
        one_bias,
        uneven,
        scaled,
        last_dense,
    ):
        with pytest.raises(UserError, match="no Hugging Face architecture"):
            family_of(odd)


@pytest.mark.parametrize(("name", "family", "parameters"), [
    ("toy", "Qwen3Moe", 0.45e6), ("moe-30m", "Qwen3Moe", 29e6), ("moe-150m", "Qwen3Moe", 148e6),
    ("moe-500m", "Qwen3Moe", 493e6),
    ("qwen3-0.6b", "Qwen3", 596_049_920), ("qwen3-1.7b", "Qwen3", 1_720_574_976), ("qwen3-4b", "Qwen3", 4_022_468_096),
    ("qwen3-8b", "Qwen3", 8_190_735_360), ("qwen3-30b-a3b", "Qwen3Moe", 30_532_122_624),
    ("qwen3-235b-a22b", "Qwen3Moe", 235_093_634_560),
    ("qwen2.5-0.5b", "Qwen2", 494_032_768), ("qwen2.5-1.5b", "Qwen2", 1_543_714_304),
    ("qwen1.5-moe-a2.7b", "Qwen2Moe", 14_315_784_192),
    ("mixtral-8x7b", "Mixtral", 46_702_792_704),
    ("llama-3.2-1b", "Llama", 1_235_814_400), ("olmoe-1b-7b", "Olmoe", 6_919_161_856),
])  # fmt: skip
def test_models_have_the_published_number_of_parameters(name, family, parameters):
    # Catches a wrong width, depth, vocabulary or tying. Published models to the last parameter, ours to 3 in 100.
    spec = spec_of(name) if name != "toy" else dataclasses.replace(spec_of(name), vocab_size=13)
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(abstract_params(Transformer(spec))))
    assert family_of(spec) == f"{family}ForCausalLM"
    assert count == parameters if parameters % 1000 else count == pytest.approx(parameters, rel=0.03)
    assert spec_from_hf(hf_config(spec), dtype=spec.dtype, moe_backend=spec.moe_backend, remat=spec.remat) == spec


def test_all_models_are_counted_and_an_unknown_name_lists_them():
    # Catches a model that was added and never counted.
    counted = test_models_have_the_published_number_of_parameters.pytestmark[0].args[1]
    assert {row[0] for row in counted} == set(models.MODELS)
    with pytest.raises(ValueError, match=r"qwen3-0\.6b"):
        models.model("gpt-2")


def test_a_vocabulary_that_is_smaller_than_the_tokenizers_is_refused():
    # Catches ids that the embedding would clamp to its last row.
    config = base.rl()
    config.model.vocab_size = 3
    with pytest.raises(UserError, match="vocab_size=3"):
        make_model(build.rl_plan(config).model, CharTokenizer("0123"))
    config.model.vocab_size = 64
    assert make_model(build.rl_plan(config).model, CharTokenizer("0123")).spec.vocab_size == 64
