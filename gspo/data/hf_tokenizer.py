"""The tokenizer of a published model, read from the files of its folder."""

import datetime
import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import tokenizers
from absl import logging

from gspo.data.example import Message
from gspo.types import UserError

FILES = (  # all that is read
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)


ROLES = ("bos", "eos", "pad", "unk", "cls", "sep", "mask")
NOTHING = {"tools": None, "documents": None}  # a template may ask whether they are none, where we have none


def now() -> str:
    """The date of a run, to be saved with it: the local time, ISO 8601."""
    return datetime.datetime.now().isoformat(timespec="seconds")


class HFTokenizer:
    """A Hugging Face tokenizer.json, with what the files beside it say about special tokens and chat.

    path: the folder, or the tokenizer.json in it. Read where present, all from that folder:
      generation_config.json    eos_token_id, an int or a list of them (chat models end a turn with another token than a
                                document)
      tokenizer_config.json     eos_token, pad_token, bos_token, chat_template
      special_tokens_map.json   the same tokens, where tokenizer_config.json leaves them out
      chat_template.jinja       goes before the chat_template of tokenizer_config.json
    The eos tokens of all files count. Without a pad token, the first eos pads. What is imitated ends with the one that
    the chat template writes behind an answer; where it writes none, with the first.

    A prompt begins with the tokens that the files put before a text, mostly one beginning-of-sequence token: those of
    the post-processor in tokenizer.json, else the bos_token where tokenizer_config.json says add_bos_token. Behind a
    chat template nothing is added: the template writes that token itself where its model wants it. In all of this the
    ids are those of transformers 5, which adds them to plain texts and not to rendered chats; but it disregards
    add_bos_token beside a tokenizer.json, so that folders which have it in tokenizer_config.json alone lose their BOS.

    date: what the template's `strftime_now` says, in ISO 8601 (`now` makes one). A template that writes the date into
    the prompt would make prompts of a resumed run differ from those of its first day.
    """

    def __init__(self, path: str | Path, date: str | None = None) -> None:
        self.spec, self.date = str(path), date or now()
        path = Path(path)
        self.file = file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise UserError(f"tokenizer={str(path)!r}: there is no {file.name} ({file})")
        content = _read_json(file)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the package raises bare Exception
            raise UserError(f"tokenizer={str(path)!r}: {file} cannot be read: {_first_line(error)}") from None
        self._digest = _digest(content)
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
        tokens = {f"{role}_token": _token_text(config.get(f"{role}_token")) for role in ROLES}
        self._special = {key: tokens[key] for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
        self._said = {key: token for key, token in tokens.items() if token is not None} | NOTHING  # to the template
        self._template_source = _template_source(file.parent, config)
        self._template = _compiled(self._template_source, file.parent, self.date)
        self.eos_ids = self._read_eos_ids(file.parent)
        self.end_id = self._read_end_id()
        pad = self._special["pad_token"]
        self.pad_id = self.eos_ids[0] if pad is None else self._id_of(pad, "pad_token", file.parent)
        self.prefix_ids = self._read_prefix_ids(content.get("post_processor"), config.get("add_bos_token"))

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

    def _read_end_id(self) -> int:
        """The eos token that the chat template writes behind an answer, else the first of all."""
        if self._template is None or len(self.eos_ids) == 1:
            return self.eos_ids[0]
        answer, behind = "An answer.", ""
        try:
            text = self._rendered([{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}], False)
            _, found, behind = text.rpartition(answer)
            behind = behind if found else ""
        except Exception as error:  # a program of the model's authors, which may know no answers
            logging.info("tokenizer in %s: the chat template writes no answer: %s", self.file.parent, error)
        return next((i for i in self.encode(behind) if i in self.eos_ids), self.eos_ids[0])

    def _rendered(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        return self._template.render(messages=messages, add_generation_prompt=add_generation_prompt, **self._said)

    def _read_prefix_ids(self, processor: dict[str, Any] | None, add_bos_token: Any) -> tuple[int, ...]:
        """Ids that the files put before a text. Those after it (an eos) are no business of a prompt."""
        ids = _before_text(processor or {})
        if any(not 0 <= i < self.vocab_size for i in ids):
            raise UserError(
                f"tokenizer in {self.file.parent}: the post_processor adds ids {ids}, which are not all ids"
            )
        if ids and add_bos_token is False:
            logging.warning(
                "tokenizer in %s: tokenizer_config.json says add_bos_token=false, but the post_processor of "
                "tokenizer.json puts ids %s before a text; prompts begin with them, as in transformers 5",
                self.file.parent,
                ids,
            )
        if ids or not add_bos_token:
            return tuple(ids)
        if self._special["bos_token"] is None:
            raise UserError(f"tokenizer in {self.file.parent}: add_bos_token is true, but there is no bos_token")
        return (self._id_of(self._special["bos_token"], "bos_token", self.file.parent),)

    def encode(self, text: str) -> list[int]:
        # A lone surrogate (legal in JSON, not in UTF-8) would raise inside the package.
        text = text.encode("utf-8", errors="replace").decode("utf-8")
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        skip = {self.pad_id, *self.eos_ids}  # not every tokenizer.json marks these as special
        known = [int(i) for i in ids if 0 <= i < self.vocab_size and int(i) not in skip]
        return self._tokenizer.decode(known, skip_special_tokens=True)

    def format_prompt(self, prompt: str | Sequence[Message]) -> str:
        if self._template is None:
            return plain_prompt(prompt, self.spec)
        try:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
            return self._rendered(messages, True)
        except Exception as error:  # a template is a program of the model's authors: it may fail in any way
            raise UserError(f"the tokenizer's chat template failed: {_first_line(error)}") from None

    def prompt_ids(self, prompt: str | Sequence[Message]) -> list[int]:
        ids = self.encode(self.format_prompt(prompt))
        return self.begun(ids) if self._template is None else ids

    def begun(self, ids: list[int]) -> list[int]:
        """The ids of a text behind those that the files put before one, where they do not stand there already."""
        there = tuple(ids[: len(self.prefix_ids)]) == self.prefix_ids
        return ids if there else [*self.prefix_ids, *ids]

    def contents(self) -> dict[str, Any]:
        return {
            "tokenizer_json": self._digest,
            "special_tokens": dict(self._special),
            "prefix_ids": list(self.prefix_ids),
            "chat_template": self._template_source,
        }


def plain_prompt(prompt: str | Sequence[Message], spec: str) -> str:
    """The prompt of a tokenizer without a chat template."""
    if isinstance(prompt, str):
        return prompt
    raise UserError(
        f"tokenizer={spec!r} has no chat template, and so no way to write messages or task.system_prompt: give prompts "
        "as texts, or take a chat model's tokenizer"
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


def _before_text(processor: dict[str, Any]) -> list[int]:
    """Ids that a post_processor of tokenizer.json puts before a single text."""
    match processor.get("type"):
        case "Sequence":  # each works on what the one before it made
            return [i for inner in reversed(processor["processors"]) for i in _before_text(inner)]
        case "TemplateProcessing":
            pieces = itertools.takewhile(lambda piece: "Sequence" not in piece, processor["single"])
            return [i for piece in pieces for i in processor["special_tokens"][piece["SpecialToken"]["id"]]["ids"]]
        case "BertProcessing" | "RobertaProcessing":
            return [processor["cls"][1]]
    return []


def _digest(content: dict[str, Any]) -> str:
    """SHA-256 of a tokenizer.json, whatever its white space and the order of its keys. Truncation and padding, which
    are never applied here, do not count."""
    kept = {key: value for key, value in content.items() if key not in ("truncation", "padding")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _template_source(folder: Path, config: dict[str, Any]) -> Any:
    """The text of the chat template, or None."""
    file = folder / "chat_template.jinja"
    source = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else config.get("chat_template")
    if isinstance(source, list):  # several named templates; the one that is used unasked is called "default"
        source = {entry.get("name"): entry.get("template") for entry in source}.get("default")
    return source


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}, by which templates mark what the model says: a block like others."""

    tags = frozenset({"generation"})

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Scope:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _compiled(source: Any, folder: Path, date: str) -> jinja2.Template | None:
    """The template as a program. Sandboxed: it came with a download, and may neither reach attributes nor change
    objects."""
    if source is None:
        return None
    day = datetime.datetime.fromisoformat(date)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        # Jinja's own filter escapes for HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=day.strftime)
    try:
        return environment.from_string(source)
    except Exception as error:  # a syntax error, or no text at all
        file = folder / "chat_template.jinja"
        where = file if file.is_file() else folder / "tokenizer_config.json"
        raise UserError(f"the chat template in {where} does not compile: {_first_line(error)}") from None
