"""Completions that end after a stop string: as if the sampler had ended them there."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest

from gspo.generate import Generator, prompt_source
from gspo.steps import sampler_of
from tests.tiny_runs import kept_compiles, parts_of, rl_config  # noqa: F401 - a fixture


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    plan, tokenizer, layout, model = parts_of(rl_config(tmp_path_factory.mktemp("stop")))
    params = nn.unbox(jax.jit(model.init_params)(jax.random.key(3)))
    samplers = {
        ids: sampler_of(model, plan.data, Ending(tokenizer, *ids), *plan.rollout.drawn)
        for ids in ((), tuple(tokenizer.encode("1")))
    }
    return plan, tokenizer, layout, params, samplers


class Ending:
    """A tokenizer with one more id that ends a completion."""

    def __init__(self, tokenizer, *more):
        self.eos_ids, self.pad_id = (*tokenizer.eos_ids, *more), tokenizer.pad_id


def completions(parts, *, ends="", stop=()):
    """Of a sampler for which the token of the text `ends` ends a completion too."""
    plan, tokenizer, layout, params, samplers = parts
    source, sampler = prompt_source(plan.data, "train", tokenizer), samplers[tuple(tokenizer.encode(ends))]
    return Generator(layout, source, sampler, plan.rollout.num_generations, stop)(params, 0, 4, jax.random.key(1))


def test_a_stop_string_of_one_token_does_what_an_end_token_does(parts):
    # Catches: tokens, log-probs or routes left behind the end, the end token's own log-prob lost, a route of the last
    # token (which was never fed), a row that ended taken for one that was cut off.
    stopped, ended = completions(parts, stop=("1",)), completions(parts, ends="1")
    for field in dataclasses.fields(ended.rollout):
        got, want = (np.asarray(getattr(c.rollout, field.name)) for c in (stopped, ended))
        if field.name != "decode_steps":
            np.testing.assert_array_equal(got, want, err_msg=field.name)
    np.testing.assert_array_equal(stopped.lengths_B, ended.lengths_B)
    whole = completions(parts)
    assert (stopped.lengths_B < whole.lengths_B).sum() > 3  # or nothing was tested
    shorter = whole.rollout.truncated_B & (stopped.lengths_B < whole.lengths_B)
    assert shorter.any() and not (stopped.rollout.truncated_B & shorter).any()


def test_a_stop_string_that_the_last_token_completes_is_no_truncation(parts):
    # Catches an answer that ends where the frame does, masked as one that was cut off.
    whole = completions(parts)
    tokenizer, width = parts[1], whole.prompts.tokens_QP.shape[1]
    texts = [tokenizer.decode(row[width:]) for row in whole.tokens_BT[whole.rollout.truncated_B]]
    endings = [text[-n:] for n in range(1, len(texts[0])) for text in texts if text.find(text[-n:]) == len(text) - n]
    stopped = completions(parts, stop=(endings[0],))
    same = np.asarray(whole.rollout.truncated_B) & (stopped.lengths_B == whole.lengths_B)
    ends = [tokenizer.decode(row[width:]).find(endings[0]) >= 0 for row in whole.tokens_BT[same]]
    assert any(ends) and np.asarray(stopped.rollout.truncated_B)[same].tolist() == [not end for end in ends]


def test_a_stop_string_that_never_comes_changes_nothing(parts):
    # Catches: rows that lose their last token.
    whole, same = (completions(parts, stop=stop) for stop in ((), ("0 1 0 1 0 1",)))
    jax.tree.map(np.testing.assert_array_equal, same.rollout, whole.rollout)
