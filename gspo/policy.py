"""A policy taken from its folder alone: weights, model and tokenizer as the weights say."""

import os
from typing import NamedTuple

from gspo.data.tokenizer import Tokenizer
from gspo.model.transformer import Transformer, abstract_params
from gspo.run.checkpoint import restore_params
from gspo.run.identity import POLICY, dated_tokenizer, kind_of, saved_identity, spec_of, tokenizer_of
from gspo.types import Params, UserError


class Policy(NamedTuple):
    model: Transformer
    tokenizer: Tokenizer
    params: Params


def load_policy(folder: str | os.PathLike, named: str) -> Policy:
    """The weights in a run, a folder of scripts/import_hf.py, or one step's checkpoint ("runs/x@best"), on one device.
    named: what an error begins with, "--workdir=runs/x" say. Raises UserError."""
    saved = saved_identity(folder)
    if saved is None:
        raise UserError(f"{named}: no checkpoint that says what model it is of can be read there")
    if kind_of(saved) != POLICY:
        raise UserError(f"{named}: the weights are those of a {kind_of(saved)}, which writes nothing; name a policy's")
    found = tokenizer_of(saved, folder)
    if found is None:
        raise UserError(f"{named}: its weights were saved without a tokenizer")
    tokenizer, model = dated_tokenizer(found, saved.get("date")), Transformer(spec_of(saved))
    _, params = restore_params(folder, abstract_params(model))
    return Policy(model, tokenizer, params)


def prompt_width(length: int, narrowest: int = 16) -> int:
    """Columns of a frame for a prompt of so many tokens: a power of two, so that few frames are compiled."""
    width = narrowest
    while width < length:
        width *= 2
    return width
