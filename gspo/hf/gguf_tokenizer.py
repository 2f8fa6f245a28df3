"""The tokenizer of a GGUF file, as the files of a Hugging Face folder.

The metadata of a byte-level BPE hold its tokens, their kinds, its merges, the ids of the special tokens and the chat
template. How a text is cut before the merges begin is only named (`tokenizer.ggml.pre`): `CUTS` says what the tokenizer
of that name had in its own tokenizer.json. llama.cpp's patterns are not it: they are rewritten for its own engine, and
it does not normalise.

Source: the tokenizer.json files of SmolLM2, Llama 3, Qwen2 and GPT-2; convert_hf_to_gguf.py of llama.cpp."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from gspo.types import UserError

GGML = "tokenizer.ggml."
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # kinds of tokens (gguf.TokenType); 1 is a piece of text

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


class Cut(NamedTuple):
    """How a text is cut into the pieces that merges stay within.

    pattern: of the pieces; "": GPT-2's own. digits: each digit stands alone before that. whole: a piece that is a token
    is not built up from its bytes. bos: whether the beginning-of-sequence token is put before a text, where the file
    does not say.
    """

    pattern: str = ""
    digits: bool = False
    normalise: bool = False
    whole: bool = False
    bos: bool = False

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        steps = [pre_tokenizers.Digits(individual_digits=True)] if self.digits else []
        steps += [pre_tokenizers.Split(Regex(self.pattern), "isolated")] if self.pattern else []
        steps += [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not self.pattern)]
        return pre_tokenizers.Sequence(steps)


_LLAMA3, _QWEN2 = Cut(LLAMA3, whole=True, bos=True), Cut(QWEN2, normalise=True)
CUTS = {
    "gpt-2": Cut(),
    "smollm": Cut(digits=True),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
}


def files_of(metadata: Mapping[str, Any], where: str | Path) -> dict[str, str]:
    """{name: text} of tokenizer.json, tokenizer_config.json and generation_config.json. where: what errors call the
    file.

    Raises UserError for tokenizers of another kind, cuts that are not known, and lists that do not fit together.
    """
    kind = metadata.get(GGML + "model")
    if kind != "gpt2":
        raise UserError(
            f"{where}: its tokenizer is of kind {kind!r}; only byte-level BPE ('gpt2') can be rebuilt: import the "
            "model's folder of safetensors instead"
        )
    tokens, kinds, merges = (metadata.get(GGML + key) for key in ("tokens", "token_type", "merges"))
    if not tokens or merges is None or (kinds is not None and len(kinds) != len(tokens)):
        raise UserError(f"{where}: {GGML}tokens, {GGML}token_type and {GGML}merges are missing or of unequal lengths")
    ids = {role: _id_of(metadata, key, len(tokens), where) for role, key in ROLES.items()}
    tokenizer = _tokenizer(metadata, tokens, kinds or [1] * len(tokens), merges, ids["bos"], where)
    ends = [i for i in (ids["eos"], ids.pop("eot"), ids.pop("eom")) if i is not None]
    config = {f"{role}_token": tokens[i] for role, i in ids.items() if i is not None}
    config |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "chat_template": metadata.get("tokenizer.chat_template"),
    }
    ends = list(dict.fromkeys(ends))
    generation = {
        "bos_token_id": ids["bos"],
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": ids["pad"],
    }
    known = {name: value for name, value in config.items() if value is not None}
    return {
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": json.dumps(known, indent=2, ensure_ascii=False) + "\n",
        "generation_config.json": json.dumps({k: v for k, v in generation.items() if v is not None}, indent=2) + "\n",
    }


ROLES = dict(bos="bos", eos="eos", pad="padding", unk="unknown", eot="eot", eom="eom")  # what ids are for -> their key


def _id_of(metadata: Mapping[str, Any], key: str, count: int, where: str | Path) -> int | None:
    found = metadata.get(f"{GGML}{key}_token_id")
    if found is not None and not 0 <= found < count:
        raise UserError(f"{where}: {GGML}{key}_token_id={found} is not one of its {count} tokens")
    return found


def _tokenizer(
    metadata: Mapping[str, Any], tokens: list[str], kinds: list[int], merges: list[str], bos: int | None, where: Any
) -> Tokenizer:
    name = metadata.get(GGML + "pre")
    if name not in CUTS:
        raise UserError(f"{where}: how its tokenizer cuts a text, {GGML}pre={name!r}, is not known; known are "
                        f"{', '.join(CUTS)}")  # fmt: skip
    cut = CUTS[name]
    used = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != UNUSED}
    if len(used) != len(kinds) - kinds.count(UNUSED):
        raise UserError(f"{where}: {GGML}tokens names a token twice")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    try:
        tokenizer = Tokenizer(models.BPE(vocab=used, merges=pairs, ignore_merges=cut.whole))
    except Exception as error:  # the package raises bare Exception
        raise UserError(f"{where}: {GGML}merges do not fit its tokens: {str(error).splitlines()[0]}") from None
    if cut.normalise:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer, tokenizer.decoder = cut.pre_tokenizer(), decoders.ByteLevel()
    tokenizer.add_tokens([
        AddedToken(token, special=kind == CONTROL, normalized=False)
        for token, kind in zip(tokens, kinds, strict=True) if kind in (CONTROL, USER_DEFINED)
    ])  # fmt: skip
    if bos is not None and metadata.get(GGML + "add_bos_token", cut.bos):
        begin = f"{tokens[bos]}:0 $A:0"
        tokenizer.post_processor = processors.TemplateProcessing(
            single=begin, pair=f"{begin} $B:1", special_tokens=[(tokens[bos], bos)]
        )
    return tokenizer
