"""Prompts that run once for their group: the update, the scores and the metrics are those of whole frames."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from gspo.learning.learner import UpdatePlan, make_train_step
from gspo.learning.microbatch import shared_rows
from gspo.learning.scores import Scores, make_scorer
from gspo.masked import values
from gspo.model.transformer import Transformer
from gspo.objectives import preset
from gspo.types import Batch, LossInputs, TrainState, map_arrays
from tests import model_oracle as oracle
from tests.few_rows import DENSE, MOE, OPTIMIZER, WARM

G, P, C = 4, 5, 6
B, T = 3 * G, P + C
RSPO = preset("rspo")


def make_batch(spec, replay):
    """Three groups of unlike prompts, junk under all padding, completions of unlike lengths."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 11, n) for n in (5, 2, 3)]
    prompt_QP, _ = oracle.left_padded(prompts, P, rng, 11)
    mask_BC = np.arange(C) < rng.integers(1, C + 1, B)[:, None]
    routes = logits = router_logp = None
    if spec.num_experts:
        routes = np.stack([rng.permutation(5)[:2] for _ in range(2 * B * T)]).reshape(2, B, T, 2).astype(np.int8)
        routes[:, :, :P] = np.repeat(routes[:, ::G, :P], G, axis=1)
        logits = rng.standard_normal((2, B, T, 5)).astype(np.float32)
        router_logp = -rng.exponential(1.0, (2, B, C, 2)).astype(np.float32)
    return Batch(
        tokens_BT=np.concatenate([np.repeat(prompt_QP, G, 0), rng.integers(0, 11, (B, C))], 1).astype(np.int32),
        prompt_lengths_B=np.repeat([5, 2, 3], G).astype(np.int32),
        completion_lengths_B=mask_BC.sum(axis=1).astype(np.int32),
        inputs=LossInputs(
            logp_BC=None,
            old_logp_BC=-rng.exponential(2.0, (B, C)).astype(np.float32),
            advantages_BC=np.where(mask_BC, rng.standard_normal((B, 1)), 0).astype(np.float32),
            mask_BC=mask_BC,
            old_router_logp_LBCX=router_logp,
        ),
        old_routes_LBTX=routes,
        replayed_routes_LBTX=routes if replay else None,
        old_router_logits_LBTE=logits,
    )


@functools.cache
def step_of(spec, objective, micro_batch_size, rows_per_prompt):
    losses = {"router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.01} if spec.num_experts else {}
    plan = UpdatePlan(micro_batch_size=micro_batch_size, chunk=4, **losses)
    return make_train_step(
        Transformer(spec), OPTIMIZER, objective, plan, sampling=WARM, rows_per_prompt=rows_per_prompt
    )


def update(spec, objective, batch, **keywords):
    params = jax.tree.map(jax.numpy.copy, oracle.build(spec)[1])
    state = TrainState(jax.numpy.int32(0), params, OPTIMIZER.init(params))
    state, metrics = step_of(spec, objective, **keywords)(state, batch)
    return jax.tree.map(np.asarray, state.opt_state[0]), values(jax.device_get(metrics))


@pytest.mark.parametrize(
    ("spec", "objective", "replay", "micro_batch_size", "rows_per_prompt"),
    [
        (DENSE, preset("grpo"), False, 0, 4),
        (MOE, RSPO, False, 0, 4),
        pytest.param(MOE, preset("gspo"), True, 4, 4, marks=pytest.mark.slow),  # a group at a time
        (MOE, preset("gspo"), True, 6, 2),  # one and a half groups at a time: pairs share their prompt
        pytest.param(
            dataclasses.replace(MOE, attention_chunk=2, remat=True), preset("gspo"), False, 0, 4, marks=pytest.mark.slow
        ),
    ],
    ids=["dense", "rspo", "replay-by-group", "replay-by-pairs", "chunked-remat"],
)
def test_an_update_is_that_of_whole_frames(spec, objective, replay, micro_batch_size, rows_per_prompt):
    # Catches the gradient of a prompt that is counted once where G completions send one, router metrics and losses of
    # other columns, replayed routes of another row, micro-batches that tear groups apart.
    batch = make_batch(spec, replay)
    wanted, plain = update(spec, objective, batch, micro_batch_size=0, rows_per_prompt=1)
    keywords = {"micro_batch_size": micro_batch_size, "rows_per_prompt": rows_per_prompt}
    found, metrics = update(spec, objective, batch, **keywords)
    for (path, leaf), other in zip(jax.tree_util.tree_leaves_with_path(wanted), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(other, leaf, atol=1e-5 * np.abs(leaf).max(), err_msg=jax.tree_util.keystr(path))
    assert metrics.keys() == plain.keys()
    for name, value in plain.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("micro_batch_size", [0, 6], ids=["all", "pairs"])
def test_every_score_is_that_of_whole_frames(micro_batch_size):
    # Catches scores that come back in the order in which micro-batches were dealt, and arrays that stay packed.
    model, params = oracle.build(MOE)
    batch, rows_per_prompt = make_batch(MOE, False), shared_rows(micro_batch_size or B, 1, G)
    assert rows_per_prompt == (2 if micro_batch_size else 4)
    options = {"completion_width": C, "sampling": WARM, "chunk": 128, "keep": tuple(Scores.__dataclass_fields__)}
    call = (params, batch.tokens_BT, batch.prompt_lengths_B)
    wanted = make_scorer(model, **options)(*call)
    found = make_scorer(model, micro_batch_size=micro_batch_size, rows_per_prompt=rows_per_prompt, **options)(*call)
    real_BT = np.arange(T) >= (P - batch.prompt_lengths_B)[:, None]

    def close(dims, one, other):
        one, other = (np.where(real_BT[None, ..., None], x, 0) if dims in ("LBTX", "LBTE") else x for x in (one, other))
        one, other = (np.where(real_BT[None], x, 0) if dims == "LBT" else x for x in (one, other))
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-5, err_msg=dims)

    map_arrays(lambda *xs: close(*xs) or xs[1], wanted, found)


def test_rows_share_a_prompt_only_where_no_cut_can_part_them():
    # Catches rows of two groups that are taken for one: seven of a device's rows, say, where groups have eight.
    for rows, devices, generations in [(64, 1, 8), (16, 2, 8), (12, 2, 4), (12, 4, 8), (5, 5, 8), (24, 2, 16)]:
        shared, group_of = shared_rows(rows, devices, generations), np.arange(4 * rows * generations) // generations
        per_device = rows // devices
        cuts = group_of[: len(group_of) // per_device * per_device].reshape(-1, per_device)
        for cut in cuts:
            assert (cut.reshape(-1, shared) == cut.reshape(-1, shared)[:, :1]).all()
    assert shared_rows(64, 1, 8) == 8 and shared_rows(12, 4, 8) == 1 and shared_rows(12, 1, 8) == 4
