"""Rollouts: what is drawn, what is recorded about it, and that the learner sees the same numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspo.learning import decoded
from gspo.learning.sampler import in_compute_dtype, make_sampler
from gspo.learning.scores import score_completions
from gspo.model.distribution import Sampling
from gspo.model.transformer import Transformer
from tests import model_oracle as oracle

DENSE, MOE, FULL = oracle.DENSE, oracle.MOE, oracle.FULL
Q, G, P, C, V = 3, 4, 5, 6, 11
B, T = Q * G, P + C
CUTS = Sampling(temperature=0.7, top_k=7, top_p=0.9, min_p=0.02)
PROMPTS = [[4, 9, 2, 0, 7], [3, 3, 8], [5]]


@functools.cache
def sampler_of(spec, sampling, eos_ids, pad_id):
    return make_sampler(
        Transformer(spec), num_generations=G, max_completion_length=C, eos_ids=eos_ids, pad_id=pad_id, sampling=sampling
    )


def prompt_frames():
    return oracle.left_padded(PROMPTS, P, np.random.default_rng(0), V)[0], np.array([len(p) for p in PROMPTS], np.int32)


def roll(spec, sampling, eos_ids, pad_id, key=0, params=None):
    params = oracle.build(spec)[1] if params is None else params
    rollout = sampler_of(spec, sampling, eos_ids, pad_id)(params, *prompt_frames(), jax.random.key(key))
    return jax.tree.map(np.asarray, rollout)


def always(distribution_V):
    """Parameters of MOE under which every next token has these logits, whatever came before."""
    params = dict(oracle.build(MOE)[1])
    params["embedding"] = jnp.ones_like(params["embedding"])
    params["blocks"] = jax.tree.map(jnp.zeros_like, params["blocks"])
    params["final_norm"] = {"scale": jnp.ones(MOE.d_model)}
    params["head"] = jnp.broadcast_to(jnp.asarray(distribution_V, jnp.float32) / MOE.d_model, (MOE.d_model, V))
    return params


# pad_id 3 is also an end token in the first, an ordinary token in the second.
PLAIN = (MOE, Sampling(), (1, 3), 3)
CUT = (DENSE, CUTS, (1,), 0)
BOTH = pytest.mark.parametrize("case", [PLAIN, CUT], ids=["moe-pad-is-eos", "dense-cuts"])


# ---------------------------------------------------------------- agreement with the learner


@pytest.mark.parametrize(
    "case",
    [PLAIN, CUT, (FULL, Sampling(), (1,), 0)]
    + [
        pytest.param(case, marks=pytest.mark.slow)
        for case in (
            (MOE, CUTS, (1,), 0),
            (DENSE, Sampling(), (1,), 0),
            (dataclasses.replace(MOE, moe_backend="ragged"), Sampling(temperature=0.7), (1,), 0),
            (MOE, Sampling(top_k=3), (), 0),
            (MOE, Sampling(top_p=0.7), (), 0),
            (MOE, Sampling(min_p=0.3), (), 0),
        )
    ],
    ids=["moe", "dense-cuts", "full", "moe-cuts", "dense", "moe-ragged", "moe-top-k", "moe-top-p", "moe-min-p"],
)
def test_log_probs_equal_those_of_the_learner(case):
    # Catches a temperature that only one of the two applies, cuts that reach a log-prob, positions that differ under
    # padding, a log-prob of the wrong token: each makes the first ratio differ from 1 before anything was learned.
    spec, sampling, _, _ = case
    model, params = oracle.build(spec)
    score = jax.jit(functools.partial(score_completions, model, completion_width=C, sampling=sampling))
    for key in range(3):
        rollout = roll(*case, key=key)
        scores = score(params, rollout.tokens_BT, rollout.prompt_lengths_B)
        mask_BC = np.arange(C) < rollout.completion_lengths_B[:, None]
        np.testing.assert_allclose(np.where(mask_BC, scores.logp_BC, 0), rollout.logp_BC, atol=1e-5)
        assert (rollout.logp_BC <= 0).all() and rollout.logp_BC[mask_BC].mean() < -0.3
        if spec.num_experts:
            fed_BT = (np.arange(T) >= (P - rollout.prompt_lengths_B)[:, None]) & (
                np.arange(T) < (P + rollout.completion_lengths_B - 1)[:, None]
            )
            expected = np.where(fed_BT[None, :, :, None], scores.free_routes_LBTX, -1)
            np.testing.assert_array_equal(rollout.routes_LBTX, expected)
            assert rollout.routes_LBTX.dtype == np.int8
        else:
            assert rollout.routes_LBTX is None


@pytest.mark.parametrize(
    "cuts", [{"top_p": 0.75}, {"temperature": 0.5, "top_k": 3, "top_p": 0.8, "min_p": 0.0625}], ids=["top-p", "all"]
)
def test_a_token_on_the_edge_of_a_cut_moves_no_log_prob_between_sampler_and_learner(cuts):
    # Catches ratios of the cut distribution: the learner's logits differ from the sampler's by rounding, its kept set
    # by a token, and every log-prob by the log of that token's mass, 0.1 to 0.3 nats here.
    p = np.full(V, 0.125 / 8)
    p[[4, 6, 7, 9]] = 0.5, 0.125, 0.125, 0.125  # 0.75 before the last of the three that tie; a quarter of the first
    params = always(np.log(p / p.sum()))
    rollout = roll(MOE, Sampling(**cuts), (1,), 0, params=params)
    assert set(rollout.tokens_BT[:, P:][np.arange(C) < rollout.completion_lengths_B[:, None]]) <= {4, 6, 7, 9}
    score = jax.jit(
        functools.partial(score_completions, Transformer(MOE), completion_width=C, sampling=Sampling(**cuts))
    )
    mask_BC = np.arange(C) < rollout.completion_lengths_B[:, None]
    for seed in range(5):
        noise = 1e-6 * np.random.default_rng(seed).standard_normal(params["head"].shape)
        scores = score(params | {"head": params["head"] * (1 + noise)}, rollout.tokens_BT, rollout.prompt_lengths_B)
        np.testing.assert_allclose(np.where(mask_BC, scores.logp_BC, 0), rollout.logp_BC, atol=1e-4)


@pytest.mark.parametrize(("side", "factor"), [("sampler", 0.7), ("learner", 1.3)])
def test_a_temperature_that_one_side_forgets_shows_in_the_log_probs(factor, side):
    # Catches a temperature that is dropped on its way to the sampler, or to the learner: a test of agreement at
    # temperature 1 would not see it, and neither would one whose log-probs hardly depend on it.
    of = {"sampler": Sampling(), "learner": Sampling()} | {side: Sampling(temperature=factor)}
    rollout = roll(DENSE, of["sampler"], (1,), 0)
    model, params = oracle.build(DENSE)
    score = jax.jit(functools.partial(score_completions, model, completion_width=C), static_argnames="sampling")
    frame = (params, rollout.tokens_BT, rollout.prompt_lengths_B)
    mask_BC = np.arange(C) < rollout.completion_lengths_B[:, None]
    gap = {name: np.abs(score(*frame, sampling=s).logp_BC - rollout.logp_BC)[mask_BC].mean() for name, s in of.items()}
    assert gap["sampler"] < 1e-5 and gap["learner"] > 0.05


def test_replaying_the_routes_of_a_sampler_with_another_router_restores_its_log_probs():
    # Catches R3 that replays anything but what ran: routes off by a column (the last token drawn is fed one step
    # later), or those of another layer. Here the sampler's router swaps the last expert of every token: a learner that
    # routes freely disagrees.
    model, params = oracle.build(MOE)
    other = Transformer(MOE, router_swap=1.0)
    sample = make_sampler(other, num_generations=G, max_completion_length=C, eos_ids=(1,), pad_id=0)
    rollout = jax.tree.map(np.asarray, sample(params, *prompt_frames(), jax.random.key(0)))
    score = jax.jit(functools.partial(score_completions, model, completion_width=C))
    routes = {"free": np.full_like(rollout.routes_LBTX, -1), "R3": rollout.routes_LBTX}
    mask_BC = np.arange(C) < rollout.completion_lengths_B[:, None]
    gap = {}
    for name, routes_LBTX in routes.items():
        scores = score(params, rollout.tokens_BT, rollout.prompt_lengths_B, replayed_routes_LBTX=routes_LBTX)
        gap[name] = np.abs(np.asarray(scores.logp_BC) - rollout.logp_BC)[mask_BC].max()
    assert gap["R3"] < 1e-5 and gap["free"] > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("spec", [DENSE, MOE, FULL], ids=["dense", "moe", "full"])
def test_bfloat16_log_probs_stay_within_the_tolerance_of_the_first_minibatch(spec):
    # Catches a sampler that computes in another dtype than the learner says: bf16 costs some hundredths of a nat and no
    # more.
    spec = dataclasses.replace(spec, dtype="bfloat16")
    model, params = oracle.build(spec)
    rollout = roll(spec, Sampling(), (1,), 0)
    scores = score_completions(
        model, params, rollout.tokens_BT, rollout.prompt_lengths_B, C, replayed_routes_LBTX=rollout.routes_LBTX
    )
    mask_BC = np.arange(C) < rollout.completion_lengths_B[:, None]
    gap = np.abs(np.asarray(scores.logp_BC) - rollout.logp_BC)[mask_BC]
    assert gap.max() < 0.2


def test_what_decides_routes_stays_float32_in_the_parameters_of_a_rollout():
    # Catches a router, or the bias by which it chooses, that is rounded for the sampler alone: other experts would run.
    params = oracle.build(FULL)[1]
    cast = in_compute_dtype(params, jnp.bfloat16)
    for name in ("router", "selection"):
        one, other = (jax.tree.leaves(tree["blocks"]["moe"][name])[0] for tree in (cast, params))
        np.testing.assert_array_equal(one, other)
        assert one.dtype == jnp.float32
    assert cast["blocks"]["moe"]["gate"].dtype == cast["blocks"]["shared"]["gate"].dtype == jnp.bfloat16


# ---------------------------------------------------------------- lengths, ends, padding


@BOTH
def test_a_row_ends_with_its_first_end_token_and_is_padding_after_it(case):
    # Catches lengths counted from token ids (a sampled pad token, pad = eos), an end token left out, one of several end
    # tokens overlooked, log-probs or routes recorded after the end.
    _, _, eos_ids, pad_id = case
    seen = {"first": 0, "pad": 0, "truncated": 0, "at_the_edge": 0, "ends": set()}
    for key in range(8):
        rollout = roll(*case, key=key)
        np.testing.assert_array_equal(rollout.tokens_BT[:, :P], np.repeat(prompt_frames()[0], G, axis=0))
        np.testing.assert_array_equal(rollout.prompt_lengths_B, np.repeat([5, 3, 1], G))
        for b in range(B):
            tokens, length = rollout.tokens_BT[b, P:], rollout.completion_lengths_B[b]
            ends = [t for t in range(C) if tokens[t] in eos_ids]
            truncated = rollout.truncated_B[b]
            if truncated:
                assert length == C and not ends
            else:
                assert length == ends[0] + 1
            assert (tokens[length:] == pad_id).all() and (rollout.logp_BC[b, length:] == 0).all()
            seen["first"] += length == 1
            seen["pad"] += pad_id in tokens[:length]
            seen["truncated"] += truncated
            seen["at_the_edge"] += length == C and not truncated
            seen["ends"] |= set() if truncated else {int(tokens[length - 1])}
        assert rollout.decode_steps == rollout.completion_lengths_B.max()
    assert seen["first"] and seen["pad"] and seen["truncated"] and seen["at_the_edge"], "the case was never met"
    assert seen["ends"] == set(eos_ids)


def test_decoding_stops_when_all_rows_have_ended_and_not_before():
    # Catches a loop that always runs to the maximum, one that stops at the first end, and an end token drawn first that
    # is missed.
    z = np.zeros(V)
    z[1] = 200.0
    at_once = roll(*PLAIN, params=always(z))
    assert at_once.decode_steps == 1 and (at_once.completion_lengths_B == 1).all() and not at_once.truncated_B.any()
    z[[1, 3]] = -200.0
    never = roll(*PLAIN, params=always(z))
    assert never.decode_steps == C and (never.completion_lengths_B == C).all() and never.truncated_B.all()
    z[1] = 3.0  # an end has probability 0.7: rows end at different columns, all well before the maximum
    lengths = [roll(*PLAIN, key=key, params=always(z)) for key in range(6)]
    assert all(r.decode_steps == r.completion_lengths_B.max() for r in lengths)
    assert any(r.decode_steps < C for r in lengths) and all(
        r.completion_lengths_B.min() < r.decode_steps for r in lengths
    )


# ---------------------------------------------------------------- randomness


def test_each_row_and_each_step_draws_its_own_noise_from_the_key():
    # Catches a key that never advances (every step, row or rollout draws alike) and noise that does not come from the
    # key at all.
    uniform = always(np.where(np.isin(np.arange(V), (1, 3)), -200.0, 0.0))  # no end tokens
    rollouts = [roll(*PLAIN, key=key, params=uniform).tokens_BT[:, P:] for key in (0, 1, 0)]
    np.testing.assert_array_equal(rollouts[0], rollouts[2])
    assert (rollouts[0] != rollouts[1]).mean() > 0.5
    assert len({tuple(row) for row in rollouts[0]}) == B, "two rows of a rollout are alike"
    assert len({tuple(column) for column in rollouts[0].T}) == C, "two steps of a rollout are alike"


def test_completions_follow_the_distribution_of_the_oracle():
    # Catches noise added twice, a temperature that multiplies, a cut that is off by one token, steps that share their
    # noise: in pairs of tokens each shows. 20,000 completions of two tokens, chi-square with a fixed key.
    sampling = Sampling(temperature=0.8, top_k=5, min_p=0.05)
    rows = 20_000
    model, params = oracle.build(DENSE)
    sample = make_sampler(model, num_generations=rows, max_completion_length=2, eos_ids=(), pad_id=0, sampling=sampling)
    rollout = sample(params, np.array([[9, 3, 8]], np.int32), np.array([2], np.int32), jax.random.key(0))
    counts = np.zeros((V, V))
    np.add.at(counts, tuple(np.asarray(rollout.tokens_BT[:, 3:]).T), 1)
    exact = oracle.float64(params)

    def next_token(tokens):
        return oracle.distribution(oracle.decoder(exact, DENSE, tokens)[0][-1], 0.8, top_k_=5, min_p=0.05)

    expected = np.stack([p * next_token([3, 8, token]) for token, p in enumerate(next_token([3, 8]))]) * rows
    assert (counts[expected == 0] == 0).all(), "a token outside of the kept set was drawn"
    cells = expected >= 5
    counts, expected = counts[cells], expected[cells]
    degrees = cells.sum()
    statistic = np.sum((counts - expected) ** 2 / expected)
    assert degrees > 8 and statistic < degrees + 4 * np.sqrt(2 * degrees)


# ---------------------------------------------------------------- greedy decoding


@pytest.mark.parametrize("spec", [MOE, pytest.param(DENSE, marks=pytest.mark.slow)], ids=["moe", "dense"])
def test_greedy_decoding_equals_the_argmax_of_a_full_forward_of_each_prompt_alone(spec):
    # Catches a cache of the wrong row or column, prompts of a batch that see each other, a first token taken from the
    # wrong hidden state, log-probs of 0 where the model's own (at temperature 1) are asked for.
    eos_ids = (1,)
    rollout = roll(spec, Sampling(temperature=0), eos_ids, 0)
    exact = oracle.float64(oracle.build(spec)[1])
    for b in range(B):
        tokens = list(PROMPTS[b // G])
        for t in range(rollout.completion_lengths_B[b]):
            logits, routes, _ = oracle.decoder(exact, spec, tokens)
            assert np.diff(np.sort(logits[-1])[-2:])[0] > 1e-4, "a tie: choose another seed"
            tokens.append(int(np.argmax(logits[-1])))
            assert rollout.tokens_BT[b, P + t] == tokens[-1]
            logp = np.log(oracle.softmax(logits[-1]).max())
            assert rollout.logp_BC[b, t] == pytest.approx(logp, abs=2e-5)
        if spec.num_experts:
            last = P + rollout.completion_lengths_B[b] - 1
            np.testing.assert_array_equal(rollout.routes_LBTX[:, b, P - len(PROMPTS[b // G]) : last], routes)
        assert (tokens[-1] in eos_ids) != rollout.truncated_B[b]


# ---------------------------------------------------------------- compilation


@BOTH
def test_the_sampler_is_compiled_once(case):
    # Catches a recompilation per rollout: minutes each on a large model. New parameters, prompts and keys are only
    # data.
    spec = case[0]
    params = oracle.build(spec)[1]
    sample = sampler_of(*case)
    before = sample._cache_size()
    for key in range(3):
        sample(jax.tree.map(lambda x: x * 1.01, params), *prompt_frames(), jax.random.key(key))
    assert sample._cache_size() == max(before, 1)


def test_a_cache_that_grows_changes_no_token(monkeypatch):
    # Catches columns lost where the cache is widened, a stretch that ends one token early, a column of the wider cache
    # that is seen before it is written.
    def tokens():
        sample = make_sampler(Transformer(MOE), num_generations=G, max_completion_length=C, eos_ids=(1,), pad_id=0)
        return jax.tree.map(np.asarray, sample(oracle.build(MOE)[1], *prompt_frames(), jax.random.key(3)))

    wide = tokens()
    assert wide.completion_lengths_B.max() == C
    monkeypatch.setattr(decoded, "FIRST_WIDTH", 1)
    assert decoded.cache_widths(C) == [1, 2, 4, C]
    grown = tokens()
    np.testing.assert_array_equal(grown.tokens_BT, wide.tokens_BT)
    np.testing.assert_allclose(grown.logp_BC, wide.logp_BC, atol=1e-5)
    np.testing.assert_array_equal(grown.routes_LBTX, wide.routes_LBTX)


def test_what_a_row_draws_does_not_depend_on_how_many_rows_there_are():
    # Catches one random number for all rows, and a key that counts rows from the end or over the whole rollout.
    few, many = (
        make_sampler(Transformer(MOE), num_generations=n, max_completion_length=C, eos_ids=(), pad_id=0) for n in (2, 3)
    )
    prompt_QP, lengths_Q = prompt_frames()
    call = (oracle.build(MOE)[1], prompt_QP[:1], lengths_Q[:1], jax.random.key(5))
    first, all_rows = few(*call).tokens_BT, many(*call).tokens_BT
    np.testing.assert_array_equal(first, all_rows[:2])
    assert len({row.tobytes() for row in np.asarray(all_rows[:, P:])}) == 3
