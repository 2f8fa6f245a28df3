"""Folders of small Hugging Face tokenizers, in the ways that published models write theirs."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

TEXTS = ["the cat sat on the mat, the end"] * 4
CHAT = (
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
CHAT_WITH_BOS = "{{ bos_token }}" + CHAT


def write_folder(folder: Path, *, config=None, generation=None, special_map=None, jinja=None, processor=None) -> Path:
    """A tokenizer.json of a byte-level BPE with four special tokens, and the files around it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<eos>", "<|start|>", "<|end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    if processor is not None:
        tokenizer.post_processor = processor
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"pad_token": "<pad>", "eos_token": "<eos>"} if config is None else config
    for name, content in (
        ("tokenizer_config", config),
        ("generation_config", generation),
        ("special_tokens_map", special_map),
    ):
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))
    if jinja is not None:
        (folder / "chat_template.jinja").write_text(jinja)
    return folder


def _template(single: str, *ids: tuple[str, int]) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single=single, pair=f"{single} $B:1", special_tokens=[*ids])


def _byte_level(special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def _sentence_piece() -> Tokenizer:
    """As the conversion of LLaMA 2's and Mixtral's SentencePiece model: "▁" for spaces, and one before the text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)
    ])  # fmt: skip
    special = ["<unk>", "<s>", "</s>", "<|start|>", "<|end|>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    content = json.loads(tokenizer.to_str())  # bytes are tokens of the vocabulary, not marks that a text may name
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(content))


def write_family(folder: Path, family: str, *, jinja: str | None = None, **changes: Any) -> Path:
    """The folder of a tokenizer written as `family` publishes its own. changes: to its tokenizer_config.json."""
    if family in ("llama2", "mixtral"):
        tokenizer, name = _sentence_piece(), "LlamaTokenizer"
        tokenizer.post_processor = _template("<s> $A", ("<s>", 1))
        config = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", add_bos_token=True, add_eos_token=False)
        config |= dict(legacy=False)
    elif family == "llama3":
        special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start|>", "<|end|>"]
        tokenizer, name = _byte_level(special), "PreTrainedTokenizerFast"
        begin = _template("<|begin_of_text|> $A", ("<|begin_of_text|>", 0))
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), begin])
        config = dict(bos_token=special[0], eos_token=special[1])
    elif family in ("qwen3", "gpt2"):
        tokenizer = _byte_level(["<|endoftext|>", "<|start|>", "<|end|>"])
        name = "PreTrainedTokenizerFast"
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
        bos = None if family == "qwen3" else "<|endoftext|>"
        config = dict(bos_token=bos, eos_token="<|endoftext|>", add_bos_token=False)
    else:
        assert family == "olmoe", family
        tokenizer, name = _byte_level(["<|endoftext|>", "<|padding|>", "<|start|>", "<|end|>"]), "GPTNeoXTokenizer"
        tokenizer.post_processor = _template("$A")
        config = dict(bos_token=None, eos_token="<|endoftext|>", pad_token="<|padding|>", add_bos_token=False)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(tokenizer_class=name) | config | changes))
    if jinja is not None:
        (folder / "chat_template.jinja").write_text(jinja)
    return folder


FAMILIES = ("llama2", "llama3", "mixtral", "qwen3", "gpt2", "olmoe")
