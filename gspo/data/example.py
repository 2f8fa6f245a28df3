"""One problem, as every task gives it and every reward reads it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from gspo.types import UserError

Message = Mapping[str, str]  # {"role": "user", "content": "..."}


@dataclasses.dataclass(frozen=True)
class Example:
    """`demonstration` is a whole completion to imitate (SFT); `metadata` is for the reward of its own task, and gives
    rewards in TRL's form their columns. `messages`: the prompt as a conversation, for the tokenizer's chat template;
    `prompt` then only shows it."""

    prompt: str
    answer: str
    demonstration: str | None = None
    metadata: Mapping[str, Any] | None = None
    messages: tuple[Message, ...] | None = None


def read_messages(value: Sequence[Any], where: str) -> tuple[Message, ...]:
    """[{"role": ..., "content": ...}, ...] as data has it. Raises UserError for what a chat template cannot write."""
    messages = []
    for number, message in enumerate(value):
        if not isinstance(message, Mapping):
            raise UserError(f"{where}: message {number} should have 'role' and 'content', not be {message!r:.40}")
        role, content = message.get("role"), message.get("content")
        if not (isinstance(role, str) and role and isinstance(content, str)):
            raise UserError(f"{where}: message {number} should have texts as 'role' and 'content', not {message!r:.60}")
        messages.append({"role": role, "content": content})
    if not messages:
        raise UserError(f"{where}: a conversation of no messages")
    return tuple(messages)


def shown(messages: Sequence[Message]) -> str:
    """A conversation as text, for people."""
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def with_system_prompt(example: Example, system_prompt: str) -> Example:
    """The example as a conversation that begins with this system message. Raises UserError where it has one."""
    messages = example.messages or ({"role": "user", "content": example.prompt},)
    if messages[0]["role"] == "system":
        raise UserError("task.system_prompt: the data has system messages of its own; leave it empty")
    messages = ({"role": "system", "content": system_prompt}, *messages)
    return dataclasses.replace(example, messages=messages)


def prompt_of(example: Example) -> str | tuple[Message, ...]:
    """What a tokenizer makes ids of."""
    return example.prompt if example.messages is None else example.messages
