"""Reward models in and out: `ForSequenceClassification` of a known family, with one label. Such a folder holds a
decoder without its head, and "score.weight" [1, D], which reads the hidden state of the last token that is no padding.

transformers finds that token by `pad_token_id`: where this is an end-of-sequence token too, it reads the token before
the end, and its scores of completions that ended are others than ours.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from gspo.hf.families import family_of
from gspo.hf.folder import export_params, import_params, read_tensor
from gspo.model.spec import ModelSpec
from gspo.parallel import distributed
from gspo.types import Params

SCORE = "score.weight"
SUFFIX = "ForSequenceClassification"


def is_classifier(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a sequence classifier."""
    return any(str(name).endswith(SUFFIX) for name in config.get("architectures") or ())


def import_reward_model(folder: str | Path, spec: ModelSpec, abstract: Params) -> Params:
    """As `import_params`, for the parameters of a reward model (`gspo.learning.rewards`). Raises UserError, also for a
    classifier of several labels."""
    body = import_params(folder, _without_head(spec), abstract["body"], besides=(SCORE,))
    score_D = read_tensor(folder, SCORE, (1, spec.d_model))[0]
    return {"body": body, "value": jnp.asarray(score_D, device=getattr(abstract["value"], "sharding", None))}


def export_reward_model(
    params: Params, spec: ModelSpec, out: str | Path, *, pad_id: int | None = None, **options: Any
) -> list[str]:
    """As `export_params`, whose further options it takes. pad_id: of the tokenizer; transformers needs one to score
    several texts at once."""
    name = family_of(spec).replace("ForCausalLM", SUFFIX)
    keys = {
        "architectures": [name],
        "tie_word_embeddings": spec.tie_embeddings,
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
    } | ({} if pad_id is None else {"pad_token_id": pad_id})
    score_1D = np.asarray(distributed.fetch(params["value"]))[None]
    return export_params(
        params["body"], _without_head(spec), out, besides={SCORE: score_1D}, config_keys=keys, **options
    )


def _without_head(spec: ModelSpec) -> ModelSpec:
    """A decoder whose head is its embedding has none of its own."""
    return dataclasses.replace(spec, tie_embeddings=True)
