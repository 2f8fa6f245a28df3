"""One row of a file of the user's own, by the names of its fields -> an example; a mistake is one line."""

from collections.abc import Mapping
from typing import Any

from gspo.data.example import Example, read_messages, shown
from gspo.data.tasks.task import suggest
from gspo.types import UserError


def example_of(
    row: Any,
    where: str,
    *,
    prompt_field: str = "prompt",
    answer_field: str = "answer",
    demonstration_field: str = "demonstration",
) -> Example:
    """The prompt is a text, or a list of messages {"role", "content"}, which the chat template of the tokenizer writes
    out. Where there is no prompt but "messages", these are the conversation. An assistant's message at its end is the
    demonstration, and the answer too where the row has none. Numbers will do as answers. Further fields are the
    example's metadata. Raises UserError.
    """
    if not isinstance(row, Mapping):
        raise UserError(
            f"{where}: expected an object with the fields {prompt_field!r} and {answer_field!r}, not "
            f"{type(row).__name__}"
        )
    row = dict(row)
    if prompt_field not in row and isinstance(row.get("messages"), list):
        prompt_field = "messages"
    if row.get(demonstration_field) is None:
        row.pop(demonstration_field, None)
    prompt, messages = row.get(prompt_field), None
    if isinstance(prompt, list):
        messages = read_messages(prompt, f"{where}: field {prompt_field!r}")
        if messages[-1]["role"] == "assistant" and len(messages) > 1:
            *messages, last = messages
            row.setdefault(demonstration_field, last["content"])
            row.setdefault(answer_field, last["content"])
        row[prompt_field] = prompt = shown(messages)
    if type(row.get(answer_field)) in (int, float):
        row[answer_field] = str(row[answer_field])
    for field in (prompt_field, answer_field, demonstration_field):
        if field not in row and field != demonstration_field:
            raise UserError(f"{where}: field {field!r} is missing{suggest(field, row)}")
        if field in row and not (isinstance(row[field], str) and (row[field] or field == answer_field)):
            raise UserError(f"{where}: field {field!r} should be a text that is not empty, not {row[field]!r:.40}")
    prompt, answer, demonstration = row.pop(prompt_field), row.pop(answer_field), row.pop(demonstration_field, None)
    return Example(prompt, answer, demonstration, row or None, None if messages is None else tuple(messages))
