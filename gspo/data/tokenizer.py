"""Text to token ids and back, behind one small protocol with three implementations.

`ByteTokenizer` needs no file and knows every text; `CharTokenizer` gives toys a vocabulary of a dozen ids;
`HFTokenizer` reads the folder of a published model. All keep two promises that the rest of the library leans on:
`encode` adds no special tokens (the sampler decides where a sequence begins and ends), and `decode` takes any integers
whatever, since an untrained policy samples ids that no encoder would write. The completion mask never comes from ids,
so a pad id that equals an eos id is harmless.

Where a model wants a beginning-of-sequence token, it stands at the head of the prompt and nowhere else: `prompt_ids`
puts it there.

A checkpoint holds the `fingerprint` of its tokenizer and, from `save_files`, the files of one that was read from a
folder; `make_tokenizer` makes it again from these, or from the fingerprint's own words."""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from gspo.data.example import Message
from gspo.data.hf_tokenizer import FILES, HFTokenizer, now, plain_prompt
from gspo.types import UserError

__all__ = [
    "ByteTokenizer",
    "CharTokenizer",
    "HFTokenizer",
    "Tokenizer",
    "difference",
    "fingerprint",
    "make_tokenizer",
    "now",
    "save_files",
]


class Tokenizer(Protocol):
    """vocab_size: ids are 0..vocab_size-1. pad_id: fills the frame.
    eos_ids: sampling any of them ends a completion. end_id: the one of them that ends demonstrations.
    spec: what `make_tokenizer` was given.
    """

    spec: str
    vocab_size: int
    pad_id: int
    eos_ids: tuple[int, ...]
    end_id: int

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: no beginning-of-sequence, no end-of-sequence."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids. Special tokens and ids outside of the vocabulary are skipped; broken UTF-8 becomes
        U+FFFD."""

    def format_prompt(self, prompt: str | Sequence[Message]) -> str:
        """A user's message, or a conversation, as the model wants to see it: through the chat template where there is
        one. Without one a text stays as it is, and a conversation is a UserError."""

    def prompt_ids(self, prompt: str | Sequence[Message]) -> list[int]:
        """Ids of that, behind a beginning-of-sequence token where the model wants one."""

    def contents(self) -> dict[str, Any]:
        """What tells it from others of its class, besides ids and sizes, as JSON values: its part of `fingerprint`."""


class ByteTokenizer:
    """UTF-8 bytes as ids 0..255, then pad = 256 and eos = 257."""

    def __init__(self) -> None:
        self.spec = "bytes"
        self.pad_id, self.eos_ids, self.end_id, self.vocab_size = 256, (257,), 257, 258

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", errors="replace"))

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(int(i) for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")

    def format_prompt(self, prompt: str | Sequence[Message]) -> str:
        return plain_prompt(prompt, self.spec)

    def prompt_ids(self, prompt: str | Sequence[Message]) -> list[int]:
        return self.encode(self.format_prompt(prompt))

    def contents(self) -> dict[str, Any]:
        return {}


class CharTokenizer:
    """One id per character of the alphabet, in its order, then pad and eos. A character outside of it is the user's
    mistake."""

    def __init__(self, alphabet: str) -> None:
        repeated = sorted({char for char in alphabet if alphabet.count(char) > 1})
        if not alphabet or repeated:
            what = f"repeats {', '.join(map(repr, repeated))}" if repeated else "is empty"
            raise UserError(
                f"tokenizer='chars:{alphabet}': the alphabet {what}; list each character once, as in "
                "'chars:0123456789='"
            )
        self.spec, self.alphabet = f"chars:{alphabet}", alphabet
        self._ids = {char: i for i, char in enumerate(alphabet)}
        self.pad_id, self.end_id, self.vocab_size = len(alphabet), len(alphabet) + 1, len(alphabet) + 2
        self.eos_ids = (self.end_id,)

    def encode(self, text: str) -> list[int]:
        try:
            return [self._ids[char] for char in text]
        except KeyError as error:
            raise UserError(
                f"tokenizer={self.spec!r}: character {error.args[0]!r} of {text[:40]!r} is not in the alphabet; "
                "add it, or use tokenizer='bytes'"
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.alphabet[int(i)] for i in ids if 0 <= i < len(self.alphabet))

    def format_prompt(self, prompt: str | Sequence[Message]) -> str:
        return plain_prompt(prompt, self.spec)

    def prompt_ids(self, prompt: str | Sequence[Message]) -> list[int]:
        return self.encode(self.format_prompt(prompt))

    def contents(self) -> dict[str, Any]:
        return {"alphabet": self.alphabet}


def make_tokenizer(spec: str, *, date: str | None = None) -> Tokenizer:
    """ "bytes", "chars:<alphabet>", or the path of a Hugging Face tokenizer.json or of the folder that holds it.

    date: the day that chat templates may write into prompts, as `now` gave it at the start of the run; None: now. The
    processes of a run must agree on one.
    """
    if spec == "bytes":
        return ByteTokenizer()
    if spec.startswith("chars:"):
        return CharTokenizer(spec.removeprefix("chars:"))
    if spec and Path(spec).exists():
        return HFTokenizer(spec, date)
    raise UserError(
        f"tokenizer={spec!r}: unknown; give 'bytes', 'chars:0123456789=' (any alphabet), or the path of a "
        "tokenizer.json or of its folder (nothing is there)"
    )


# ---------------------------------------------------------------------------- identity


def fingerprint(tokenizer: Tokenizer) -> dict[str, Any]:
    """What the tokenizer is, as JSON values: two tokenizers agree in all of it but `spec` (where it was found) exactly
    when they give all texts the same ids, and all prompts the same frame.

    An alphabet stands in it whole and in order; a folder as a digest of its tokenizer.json, the special tokens with
    their ids, and the text of its chat template.
    """
    return {
        "spec": tokenizer.spec,
        "kind": type(tokenizer).__name__,
        "vocab_size": tokenizer.vocab_size,
        "pad_id": tokenizer.pad_id,
        "eos_ids": list(tokenizer.eos_ids),
        **tokenizer.contents(),
    }


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """The first thing in which two fingerprints differ, "eos_ids is [1], not [2]" say; None where they agree."""
    for field in dict.fromkeys([*one, *other]):
        if field != "spec" and one.get(field) != other.get(field):
            return f"{field} is {one.get(field)!r:.60}, not {other.get(field)!r:.60}"
    return None


def save_files(tokenizer: Tokenizer, folder: str | Path) -> list[str]:
    """Copies the files that the tokenizer was read from into a folder, which is made if need be, and returns their
    names. Nothing for tokenizers that are whole in their fingerprint. Raises OSError where there is no room."""
    if not isinstance(tokenizer, HFTokenizer):
        return []
    source, folder = tokenizer.file.parent, Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if source.absolute() == folder.absolute():
        return [name for name in FILES if (source / name).is_file()]
    # config.json is the model's: an export takes over what of it is no matter of ours.
    names = (*FILES, "config.json")
    files = {name: source / name for name in names if (source / name).is_file()} | {"tokenizer.json": tokenizer.file}
    for name, file in files.items():
        shutil.copyfile(file, folder / name)
    return list(files)
