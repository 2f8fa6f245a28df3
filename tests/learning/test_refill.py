"""Rows decoded some at a time: the same rows as all at once, in as few passes as the lengths allow."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from gspo.learning import decoded
from gspo.learning.sampler import make_sampler
from gspo.model.distribution import Sampling
from gspo.model.transformer import Transformer
from gspo.parallel.sharding import Layout, make_mesh
from gspo.types import UserError
from tests import model_oracle as oracle

DENSE, MOE = oracle.DENSE, oracle.MOE
Q, G, P, C, V = 4, 6, 5, 6, 11
B = Q * G
PROMPTS = [[4, 9, 2, 0, 7], [3, 3, 8], [5], [1, 6]]
CUTS = Sampling(temperature=0.7, top_k=7, top_p=0.9, min_p=0.02)
SCAN = dataclasses.replace(MOE, scan_layers=True)
# pad_id 3 is also an end token in the first, an ordinary token in the others.
PLAIN, CUT, SCANNED = (MOE, Sampling(), (1, 3), 3), (DENSE, CUTS, (1,), 0), (SCAN, Sampling(), (1, 3), 3)
needs_eight = pytest.mark.skipif(jax.device_count() < 8, reason="eight devices, real or virtual")


@functools.cache
def sampler_of(spec, sampling, eos_ids, pad_id, max_num_seqs=0, layout=Layout()):  # noqa: B008 - frozen
    return make_sampler(
        Transformer(spec, layout=layout), num_generations=G, max_completion_length=C, eos_ids=eos_ids, pad_id=pad_id,
        sampling=sampling, max_num_seqs=max_num_seqs,
    )  # fmt: skip


def arguments(spec, key):
    tokens_QP = oracle.left_padded(PROMPTS, P, np.random.default_rng(0), V)[0]
    return oracle.build(spec)[1], tokens_QP, np.array([len(p) for p in PROMPTS], np.int32), jax.random.key(key)


def roll(case, key, *how):
    return jax.device_get(sampler_of(*case, *how)(*arguments(case[0], key)))


def unrolled(case):
    """The case with its layers one after the other."""
    return dataclasses.replace(case[0], scan_layers=None), *case[1:]


def assert_same_rows(found, expected):
    for name in ("tokens_BT", "prompt_lengths_B", "completion_lengths_B", "truncated_B", "routes_LBTX"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    np.testing.assert_allclose(found.logp_BC, expected.logp_BC, atol=1e-5)


def passes(lengths, slots):
    """1 + the passes of a loop that fills free slots in the order of the rows, one in eight of the slots at least and
    as many as there are; the first token of a row costs none."""
    waiting, live, count = list(lengths), [], 1
    while waiting or live:
        if (waiting and slots - len(live) >= max(1, slots // 8)) or not live:
            moved, waiting = waiting[: slots - len(live)], waiting[slots - len(live) :]
            live += [length - 1 for length in moved]
        else:
            live, count = [left - 1 for left in live], count + 1
        live = [left for left in live if left]
    return count


@pytest.mark.parametrize(
    ("case", "slots"),
    [
        pytest.param(PLAIN, 17, id="moe-17"),
        pytest.param(SCANNED, 5, id="moe-scanned-5", marks=pytest.mark.slow),
        pytest.param(CUT, 1, id="dense-cuts-1"),
        pytest.param(PLAIN, 1, id="moe-1", marks=pytest.mark.slow),
        pytest.param(PLAIN, 23, id="moe-23", marks=pytest.mark.slow),
        pytest.param((dataclasses.replace(SCAN, moe_backend="ragged"), CUTS, (1, 3), 0), 8, id="ragged-scanned-8",
                     marks=pytest.mark.slow),
        pytest.param((DENSE, Sampling(top_p=0.7), (1, 3), 3), 2, id="dense-top-p-2", marks=pytest.mark.slow),
        pytest.param((MOE, Sampling(top_k=3), (), 0), 7, id="moe-top-k-no-ends-7", marks=pytest.mark.slow),
        pytest.param((MOE, Sampling(temperature=0), (1,), 0), 4, id="moe-greedy-4", marks=pytest.mark.slow),
        pytest.param((dataclasses.replace(DENSE, scan_layers=True), CUTS, (1,), 0), 16, id="dense-scanned-16",
                     marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_rows_decoded_some_at_a_time_are_those_decoded_all_at_once(case, slots):
    # Catches a slot that sees the columns of the row before it or the prompt of another row, noise that belongs to the
    # slot, a ring read past its end, routes, tokens or lengths of a row written to another or after its end, rows left
    # out behind the last full set of slots; and slots that stand idle, or a loop that goes on when all have ended.
    seen = {"at_once": 0, "truncated": 0, "at_the_edge": 0, "between": 0}
    for key in range(4):
        found, expected = roll(case, key, slots), roll(unrolled(case), key)
        assert_same_rows(found, expected)
        assert found.decode_steps == passes(found.completion_lengths_B, slots)
        lengths, truncated = found.completion_lengths_B, found.truncated_B
        seen["at_once"] += np.sum(lengths == 1)
        seen["truncated"] += np.sum(truncated)
        seen["at_the_edge"] += np.sum((lengths == C) & ~truncated)
        seen["between"] += np.sum((lengths > 1) & (lengths < C))
    assert all(seen.values()) or case[1].temperature == 0 or not case[2], f"a case was never met: {seen}"


def test_ends_at_the_first_token_leave_no_row_unseen():
    # Catches a loop that takes slots without a live row for the end of the work.
    spec = dataclasses.replace(DENSE, num_layers=1)
    params, *rest = arguments(spec, 0)
    params = params | {"final_norm": {"scale": params["final_norm"]["scale"] * 0}}  # all tokens are equally likely
    rollout = jax.device_get(sampler_of(spec, Sampling(), tuple(range(V)), 0, 5)(params, *rest))
    assert rollout.decode_steps == 1 and (rollout.completion_lengths_B == 1).all() and not rollout.truncated_B.any()
    np.testing.assert_allclose(rollout.logp_BC[:, 0], -np.log(V), rtol=1e-5)


def test_completions_of_one_token_need_no_pass():
    # Catches a ring of no columns, and rows that are full from the start and hold their slots.
    sample = make_sampler(
        Transformer(DENSE), num_generations=G, max_completion_length=1, eos_ids=(1,), pad_id=0, sampling=CUTS,
        max_num_seqs=7,
    )  # fmt: skip
    rollout = jax.device_get(sample(*arguments(DENSE, 0)))
    assert rollout.decode_steps == 1 and (rollout.completion_lengths_B == 1).all()
    np.testing.assert_array_equal(rollout.tokens_BT[:, P], roll(CUT, 0).tokens_BT[:, P])


def test_as_many_slots_as_rows_change_nothing_and_fewer_hold_fewer_caches():
    # Catches slots in the place of the plain loop where nobody waits, and keys and values that are kept for rows
    # without a slot.
    def program(slots):
        return str(jax.make_jaxpr(sampler_of(*PLAIN, slots))(*arguments(MOE, 0)))

    plain, heads = program(0), f"{MOE.num_kv_heads},{MOE.head_width},{C}"
    assert program(B) == plain and program(B + 3) == plain
    assert f"f32[{B},{heads}]" in plain and f"f32[{B},{heads}]" not in program(5)
    assert f"f32[5,{heads}]" in program(5)


def test_the_sampler_is_compiled_once():
    # Catches a recompilation for every number of rows that wait.
    sample = sampler_of(*PLAIN, 17)
    for key in range(5, 8):
        sample(*arguments(MOE, key))
    assert sample._cache_size() == 1


def test_a_ring_that_grows_changes_no_row(monkeypatch):
    # Catches columns that are lost or misplaced where the ring is widened, a row that is decoded past its width, and
    # slots that are left undecoded or unfilled behind the last stretch.
    monkeypatch.setattr(decoded, "FIRST_WIDTH", 1)
    grown = sampler_of.__wrapped__(*CUT, 5)
    for key in range(4):
        assert_same_rows(jax.device_get(grown(*arguments(DENSE, key))), roll(CUT, key))


# ---------------------------------------------------------------- meshes


@needs_eight
@pytest.mark.parametrize(
    ("case", "sizes"),
    [
        pytest.param(CUT, {"data": 4}, id="dense-data", marks=pytest.mark.slow),
        pytest.param(PLAIN, {"data": 2, "expert": 2}, id="moe-experts"),
        pytest.param(SCANNED, {"data": 2, "fsdp": 2}, id="scanned-fsdp", marks=pytest.mark.slow),
    ],
)
def test_devices_refill_their_own_slots_and_draw_what_one_device_draws(case, sizes):
    # Catches keys that count the rows of a device from 0, rows of one device in the slots of another, and a loop that
    # keeps the devices in step: the passes are those of the device with most.
    layout = Layout(make_mesh(sizes, jax.devices()[:4]), "single")
    for key in range(2):
        found, expected = roll(case, key, 8, layout), roll(unrolled(case), key)
        assert_same_rows(found, expected)
        shares = np.split(found.completion_lengths_B, 4)
        assert found.decode_steps == max(passes(share, 2) for share in shares)


@needs_eight
def test_slots_that_devices_cannot_share_and_weights_that_are_cut_are_refused():
    # Catches slots that are rounded, and a loop of each device's own in which devices would wait for one another.
    with pytest.raises(UserError, match=r"^max_num_seqs=6: not divisible by the 4 devices .* use a multiple of 4"):
        sampler_of(*PLAIN, 6, Layout(make_mesh({"data": 4}, jax.devices()[:4])))
    with pytest.raises(UserError, match=r"^max_num_seqs=8: .* mesh.fsdp cuts them; set rollout_mesh_rules='single'"):
        sampler_of(*PLAIN, 8, Layout(make_mesh({"data": 2, "fsdp": 2}, jax.devices()[:4])))
    sampler_of(*PLAIN, 0, Layout(make_mesh({"data": 2, "fsdp": 2}, jax.devices()[:4])))
