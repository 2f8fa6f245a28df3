"""GGUF files as llama.cpp's converter writes them, of tiny models and tokenizers, and texts to compare tokenizers on.

Tensors get their names from the package's own map of Hugging Face names, keys from its writer, and heads are reordered
by the converter's formula: nothing here is taken from `gspo.hf.gguf_file`.
"""

import dataclasses
import functools
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import numpy as np
import pytest
import tokenizers

from gspo.hf.families import table
from gspo.hf.rows import Row
from gspo.model.spec import ModelSpec
from tests import model_oracle as oracle
from tests.hf_folders import SPECS

needs_gguf = pytest.mark.skipif(
    importlib.util.find_spec("gguf") is None, reason="needs gguf: pip install -r requirements.txt"
)
WIDE = dict(d_model=32, head_width=8)  # rows of whole blocks of 32
GGUF_SPECS = {
    "LlamaForCausalLM": dataclasses.replace(SPECS["LlamaForCausalLM"], d_ff=64, **WIDE),
    "MixtralForCausalLM": dataclasses.replace(SPECS["MixtralForCausalLM"], d_expert=32, **WIDE),
    "Qwen3ForCausalLM": dataclasses.replace(SPECS["Qwen3ForCausalLM"], d_ff=64, **WIDE),
    "Qwen3MoeForCausalLM": dataclasses.replace(SPECS["Qwen3MoeForCausalLM"], d_expert=32, **WIDE),
}
ARCH = {
    "LlamaForCausalLM": "llama", "MixtralForCausalLM": "llama", "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3moe",
}  # fmt: skip


# ---------------------------------------------------------------------------- models


def permuted(weights: np.ndarray, heads: int) -> np.ndarray:
    """LlamaModel.permute of convert_hf_to_gguf.py."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, weights.shape[1])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def rope_divisors(spec: ModelSpec) -> np.ndarray:
    """LlamaModel.generate_extra_tensors of convert_hf_to_gguf.py, one frequency at a time."""
    factor, low, high, trained = spec.rope_scaling
    divisors = []
    for i in range(spec.head_width // 2):
        wave = 2 * np.pi * spec.rope_theta ** (2 * i / spec.head_width)
        if wave < trained / high:
            divisors.append(1.0)
        elif wave > trained / low:
            divisors.append(factor)
        else:
            smooth = (trained / wave - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


def write_gguf(path: Path, family: str, kind: str = "F32", *, tokens: Mapping[str, Any] | None = None, **changes: Any):
    """Writes random parameters of GGUF_SPECS[family]; returns the tree that an import must give, bit by bit.

    kind: of the matrices; vectors and routers stay float32. tokens: metadata of a tokenizer. changes: to the keys of
    the architecture, with "__" for "."; None leaves one out.
    """
    import gguf

    spec, arch = GGUF_SPECS[family], ARCH[family]
    writer, kinds = gguf.GGUFWriter(path, arch), gguf.GGMLQuantizationType
    for key, value in (
        keys_of(spec, family) | {key.replace("__", "."): value for key, value in changes.items()}
    ).items():
        add_key(writer, f"{arch}.{key}", value)
    for key, value in (tokens or {}).items():
        add_key(writer, key, value)
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names, read = gguf.get_tensor_name_map(number, spec.num_layers), {}
    leaves = flax.traverse_util.flatten_dict(oracle.build(spec)[1], sep="/")
    for row in table(spec):
        leaf = np.asarray(leaves[row.path])
        read[row.path] = np.empty_like(leaf)
        used = kinds.F32 if row.path.endswith(("scale", "router")) else kinds[kind]
        for at in np.ndindex(leaf.shape[: "{layer}" in row.name]):
            theirs = (
                leaf[at].swapaxes(-1, -2) if row.transposed else leaf[at]
            )  # as Hugging Face has it; experts stacked
            kept = gguf.dequantize(gguf.quantize(np.ascontiguousarray(theirs), used), used)
            read[row.path][at] = kept.swapaxes(-1, -2) if row.transposed else kept
            if arch == "llama" and row.path.endswith(("query", "key")):
                theirs = permuted(theirs, spec.num_heads if row.path.endswith("query") else spec.num_kv_heads)
            packed = gguf.quantize(np.ascontiguousarray(theirs), used)
            writer.add_tensor(names.get_name(merged_name(row, at), try_suffixes=(".weight",)), packed, raw_dtype=used)
    if spec.rope_scaling:
        writer.add_tensor("rope_freqs.weight", rope_divisors(spec))
    _write(writer)
    return flax.traverse_util.unflatten_dict(read, sep="/")


def write_one(path: Path, arch: str, embedding: np.ndarray) -> None:
    """A file of one tensor."""
    import gguf

    writer = gguf.GGUFWriter(path, arch)
    writer.add_tensor("token_embd.weight", embedding)
    _write(writer)


def _write(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def merged_name(row: Row, at: tuple[int, ...]) -> str:
    """The name under which the converter looks up a tensor: that of Hugging Face, its experts merged into one."""
    if "{expert}" not in row.name:
        return row.tensor(at)
    name = row.name.replace(".{expert}", "").format(layer=at[0])
    if "block_sparse_moe" not in name:
        return name
    return name.replace("model.layers", "layers").replace("block_sparse_moe", "feed_forward")


def keys_of(spec: ModelSpec, family: str) -> dict[str, Any]:
    keys = {
        "block_count": spec.num_layers, "context_length": 99, "embedding_length": spec.d_model,
        "feed_forward_length": spec.d_ff or spec.d_expert, "attention.head_count": spec.num_heads,
        "attention.head_count_kv": spec.num_kv_heads, "attention.layer_norm_rms_epsilon": spec.rms_eps,
        "rope.freq_base": spec.rope_theta, "rope.dimension_count": spec.head_width,
    }  # fmt: skip
    if spec.num_experts:
        keys |= {"expert_count": spec.num_experts, "expert_used_count": spec.experts_per_token}
    if family.startswith("Qwen"):
        del keys["rope.dimension_count"]
        keys |= {"attention.key_length": spec.head_width, "attention.value_length": spec.head_width}
    if family == "Qwen3MoeForCausalLM":
        keys |= {"feed_forward_length": 7, "expert_feed_forward_length": spec.d_expert}  # the former is of no layer
    return keys


def add_key(writer: Any, key: str, value: Any) -> None:
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
           list: writer.add_array, type(None): lambda *_: None}  # fmt: skip
    add[type(value)](key, value)


# ---------------------------------------------------------------------------- tokenizers

CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
ADDED = "<think>"  # a token of its own that is text

# "normalizer", "pre_tokenizer" and "ignore_merges" of the published tokenizer.json files, by the name that llama.cpp
# gives them: GPT-2, SmolLM2, Qwen2 to Qwen3, Llama 3.
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_SPLIT = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|%s| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|"
    "\\s+(?!\\S)|\\s+"
)


def _sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def _split(digits: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": _SPLIT % digits}, "behavior": "Isolated", "invert": False}
    return _sequence(split, _BYTES | {"use_regex": False})


PUBLISHED = {
    "gpt-2": (None, _BYTES, False),
    "smollm": (None, _sequence({"type": "Digits", "individual_digits": True}, _BYTES), False),
    "qwen2": ({"type": "NFC"}, _split("\\p{N}"), False),
    "llama-bpe": (None, _split("\\p{N}{1,3}"), True),
}


@functools.cache
def published_tokenizer(pre: str) -> tokenizers.Tokenizer:
    """A byte-level BPE of 600 tokens, trained on TEXTS, that cuts texts as the published one does."""
    normalizer, pre_tokenizer, whole = PUBLISHED[pre]
    content = json.loads(tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=whole)).to_str())
    content |= {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "decoder": _BYTES}
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=[*SPECIAL], show_progress=False,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens([tokenizers.AddedToken(ADDED, normalized=False)])
    return tokenizer


def token_keys(pre: str, tokenizer: tokenizers.Tokenizer, /, rows: int = 0, **changes: Any) -> dict[str, Any]:
    """The metadata that the converter makes of a tokenizer.json. rows: of the embedding, those without a token padded.
    changes: to keys under "tokenizer.ggml."."""
    ids = {i: token for token, i in tokenizer.get_vocab(with_added_tokens=True).items()}
    rows = max(rows, len(ids))
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    keys = {
        "model": "gpt2",
        "pre": pre,
        "tokens": [ids.get(i, f"[PAD{i}]") for i in range(rows)],
        "token_type": [
            3 if i < len(SPECIAL) else 5 if i not in ids else 4 if ids[i] == ADDED else 1 for i in range(rows)
        ],
        "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "padding_token_id": 0,
        "unknown_token_id": 0,
        "add_bos_token": False,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (keys | changes).items() if value is not None} | {
        "tokenizer.chat_template": CHAT
    }


def _all_scripts() -> list[str]:
    """Every 97th character up to the end of the emoji, surrogates apart, beside letters, digits and white space."""
    chars = [chr(code) for code in (*range(1, 0xD800, 97), *range(0xE000, 0x20000, 97))]
    return [f"a{c}b {c}{c} 1{c}23 \n{c}" for c in chars]


TEXTS = [
    "The quick brown fox can't jump over 13 lazy dogs; he'll've jumped 3.14159 times by 2024-02-29. IT'S SO.",
    "  leading, trailing   and \t\t tabs \r\n\r\n  lines\n\n\n   end   ",
    "def f(x: int) -> list[int]:\n    return [i ** 2 for i in range(0x1F)]  # O(n)\n\tif a&&b||!c { x->y += 1e-9; }",
    '<div class="a-b">&amp; $100,000.00 @user #tag https://example.org/?q=1&r=%20</div> {{ }} `` \\\\ ~~',
    "Ça coûte 12 €. Straße, naïve, cafe\u0301 (decomposed), A\u030a, ﬁ, ½, Ⅷ, x², ١٢٣, १२३, ๓, 五",
    "Привет, мир! Γειά σου Κόσμε. שלום עולם. مرحبا بالعالم. नमस्ते दुनिया। হ্যালো বিশ্ব। வணக்கம் உலகம்.",
    "你好，世界！这是一个测试。こんにちは世界、カタカナ。안녕하세요 세계! สวัสดีชาวโลก ជំរាបសួរ ສະບາຍດີ မင်္ဂလာပါ",
    "გამარჯობა მსოფლიო. Բարեւ աշխարհ. ሰላም ልዑል. ᏣᎳᎩ ᐃᓄᒃᑎᑐᑦ ᠮᠣᠩᠭᠣᠯ བོད་སྐད 𐍈𐌰𐌹 𒀀𒁀 𓀀 𝒜𝔹𝕔",
    "😀👍🏽👨‍👩‍👧‍👦🇺🇸🏳️‍🌈❤️‍🔥 1️⃣ ☎️ ➡️ ∑∫√≠≤ ←↑→↓ “quoted” ‘single’ — … \u200b\u200d\ufeff\u00a0\u3000",
    "<|im_start|>user\nHi<|im_end|>\n<think>\n</think><|endoftext|> <|not_special|>",
    *_all_scripts(),
]
