"""Text to token ids and back, behind one small protocol with three implementations.

`ByteTokenizer` needs no file and knows every text; `CharTokenizer` gives toys a vocabulary of a dozen ids;
`HFTokenizer` reads the folder of a published model. All keep two promises that the rest of the library leans on:
`encode` adds no special tokens (the sampler decides where a sequence begins and ends), and `decode` takes any integers
whatever, since an untrained policy samples ids that no encoder would write. The completion mask never comes from ids,
so a pad id that equals an eos id is harmless."""

import datetime
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers

from gspo.types import UserError


class Tokenizer(Protocol):
    """vocab_size: ids are 0..vocab_size-1. pad_id: fills the frame.
    eos_ids: sampling any of them ends a completion; demonstrations end in the first of them.
    """

    vocab_size: int
    pad_id: int
    eos_ids: tuple[int, ...]

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: no beginning-of-sequence, no end-of-sequence."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids. Special tokens and ids outside of the vocabulary are skipped; broken UTF-8 becomes
        U+FFFD."""

    def format_prompt(self, text: str) -> str:
        """A user's message as the model wants to see it: through the chat template where there is one, else
        unchanged."""


class ByteTokenizer:
    """UTF-8 bytes as ids 0..255, then pad = 256 and eos = 257."""

    def __init__(self) -> None:
        self.pad_id, self.eos_ids, self.vocab_size = 256, (257,), 258

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", errors="replace"))

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(int(i) for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")

    def format_prompt(self, text: str) -> str:
        return text


class CharTokenizer:
    """One id per character of the alphabet, in its order, then pad and eos. A character outside of it is the user's
    mistake."""

    def __init__(self, alphabet: str) -> None:
        repeated = sorted({char for char in alphabet if alphabet.count(char) > 1})
        if not alphabet or repeated:
            what = f"repeats {', '.join(map(repr, repeated))}" if repeated else "is empty"
            raise UserError(
                f"the alphabet of tokenizer 'chars:{alphabet}' {what}: list each character once, as in "
                "'chars:0123456789='"
            )
        self.alphabet = alphabet
        self._ids = {char: i for i, char in enumerate(alphabet)}
        self.pad_id, self.eos_ids, self.vocab_size = len(alphabet), (len(alphabet) + 1,), len(alphabet) + 2

    def encode(self, text: str) -> list[int]:
        try:
            return [self._ids[char] for char in text]
        except KeyError as error:
            raise UserError(
                f"character {error.args[0]!r} is not in the tokenizer's alphabet {self.alphabet!r}: "
                f"add it to 'chars:...' or use tokenizer 'bytes'"
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.alphabet[int(i)] for i in ids if 0 <= i < len(self.alphabet))

    def format_prompt(self, text: str) -> str:
        return text


class HFTokenizer:
    """A Hugging Face tokenizer.json, with what the files beside it say about special tokens and chat.

    path: the folder, or the tokenizer.json in it. Read where present, all from that folder:
      generation_config.json    eos_token_id, an int or a list of them (chat models end a turn with another token than a
                                document)
      tokenizer_config.json     eos_token, pad_token, bos_token, chat_template
      special_tokens_map.json   the same tokens, where tokenizer_config.json leaves them out
      chat_template.jinja       goes before the chat_template of tokenizer_config.json
    The eos tokens of all files count. Without a pad token, the first eos pads.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise UserError(f"tokenizer {str(path)!r}: there is no {file.name} ({file})")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the package raises bare Exception
            raise UserError(f"tokenizer file {file} cannot be read: {_first_line(error)}") from None
        # Truncation and padding saved into the file are somebody else's batch settings; here they would shorten prompts
        # silently.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        config = {
            **_read_json(file.parent / "special_tokens_map.json"),
            **{
                key: value
                for key, value in _read_json(file.parent / "tokenizer_config.json").items()
                if value is not None
            },
        }
        self._special = {
            key: _token_text(config.get(key)) for key in ("bos_token", "eos_token", "pad_token", "unk_token")
        }
        self.eos_ids = self._read_eos_ids(file.parent)
        pad = self._special["pad_token"]
        self.pad_id = self.eos_ids[0] if pad is None else self._id_of(pad, "pad_token", file.parent)
        self._template = _chat_template(file.parent, config)

    def _id_of(self, token: str, field: str, folder: Path) -> int:
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None:
            raise UserError(f"tokenizer in {folder}: {field} {token!r} is not in the vocabulary of tokenizer.json")
        return token_id

    def _read_eos_ids(self, folder: Path) -> tuple[int, ...]:
        given = _read_json(folder / "generation_config.json").get("eos_token_id")
        ids = [] if given is None else list(given) if isinstance(given, list) else [given]
        if self._special["eos_token"] is not None:
            ids.append(self._id_of(self._special["eos_token"], "eos_token", folder))
        if not ids:
            raise UserError(
                f"tokenizer in {folder} names no end-of-sequence token: "
                'give "eos_token" in tokenizer_config.json or "eos_token_id" in generation_config.json'
            )
        bad = [i for i in ids if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < self.vocab_size]
        if bad:
            raise UserError(
                f"tokenizer in {folder}: eos_token_id {bad[0]!r} of generation_config.json is not an id below "
                f"the vocabulary size {self.vocab_size}"
            )
        return tuple(dict.fromkeys(ids))

    def encode(self, text: str) -> list[int]:
        # A lone surrogate (legal in JSON, not in UTF-8) would raise inside the package.
        text = text.encode("utf-8", errors="replace").decode("utf-8")
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        skip = {self.pad_id, *self.eos_ids}  # not every tokenizer.json marks these as special
        known = [int(i) for i in ids if 0 <= i < self.vocab_size and int(i) not in skip]
        return self._tokenizer.decode(known, skip_special_tokens=True)

    def format_prompt(self, text: str) -> str:
        if self._template is None:
            return text
        special = {key: value for key, value in self._special.items() if value is not None}
        try:
            messages = [{"role": "user", "content": text}]
            return self._template.render(messages=messages, add_generation_prompt=True, **special)
        except Exception as error:  # a template is a program of the model's authors: it may fail in any way
            raise UserError(f"the tokenizer's chat template failed: {_first_line(error)}") from None


def make_tokenizer(spec: str) -> Tokenizer:
    """ "bytes", "chars:<alphabet>", or the path of a Hugging Face tokenizer.json or of the folder that holds it."""
    if spec == "bytes":
        return ByteTokenizer()
    if spec.startswith("chars:"):
        return CharTokenizer(spec.removeprefix("chars:"))
    if spec and Path(spec).exists():
        return HFTokenizer(spec)
    raise UserError(
        f"unknown tokenizer {spec!r}: give 'bytes', 'chars:0123456789=' (any alphabet), or the path of a "
        "tokenizer.json or of its folder (nothing is there)"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is no such file."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not valid JSON: {_first_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} should hold a JSON object, not a {type(content).__name__}")
    return content


def _token_text(value: Any) -> str | None:
    """Special tokens are written as a string, or as {"content": string, ...}."""
    return value.get("content") if isinstance(value, dict) else value


def _chat_template(folder: Path, config: dict[str, Any]) -> jinja2.Template | None:
    """The compiled template, or None. Sandboxed: it came with a download, and may neither reach attributes nor change
    objects."""
    file = folder / "chat_template.jinja"
    source = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else config.get("chat_template")
    if isinstance(source, list):  # several named templates; the one that is used unasked is called "default"
        source = {entry.get("name"): entry.get("template") for entry in source}.get("default")
    if source is None:
        return None

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)  # Jinja's own filter escapes for HTML

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(
        raise_exception=raise_exception, strftime_now=lambda form: datetime.datetime.now().strftime(form)
    )
    try:
        return environment.from_string(source)
    except Exception as error:  # a syntax error, or no text at all
        where = file if file.is_file() else folder / "tokenizer_config.json"
        raise UserError(f"the chat template in {where} does not compile: {_first_line(error)}") from None
