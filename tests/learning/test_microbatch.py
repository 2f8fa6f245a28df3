"""Rows in parts: nothing lost, nothing twice, nothing out of order; and gradients that do not see the split."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspo.learning.microbatch import accumulated_gradient, deal, minibatch, num_parts, undeal, undeal_fields
from gspo.types import Batch


def make_batch(rows=6):
    """A batch with every optional array, of the shape that its name says; no two entries of an array are alike."""
    sizes = {"L": 2, "B": rows, "C": 3, "T": 5, "X": 2, "E": 4}
    arrays, rng = {}, np.random.default_rng(0)
    for name in Batch.__dataclass_fields__:
        shape = [sizes[letter] for letter in name.rsplit("_")[-1]]
        arrays[name] = rng.permutation(np.prod(shape)).reshape(shape).astype(np.float32)
    return Batch(**arrays)


def row_axis(name):
    return name.rsplit("_")[-1].index("B")


def test_dealing_and_undealing_are_inverse_and_keep_every_row_once():
    # Catches a reshape in the wrong order: rows would mix with their neighbours' routes.
    x = np.arange(2 * 6 * 3).reshape(2, 6, 3)
    dealt = deal(x, 3, axis=1)
    assert dealt.shape == (3, 2, 2, 3)
    for part in range(3):
        np.testing.assert_array_equal(dealt[part], x[:, part::3])
    np.testing.assert_array_equal(undeal(dealt, axis=1), x)
    np.testing.assert_array_equal(undeal(deal(x[0], 2)), x[0])


def test_minibatches_are_the_rollout_cut_in_order_with_its_old_log_probs():
    # Catches old log-probs recomputed between updates (the ratio would stay 1), rows trained twice, an array cut along
    # its layers.
    batch = make_batch()
    parts = [minibatch(batch, j, 3) for j in range(3)]
    for name, whole in vars(batch).items():
        pieces = [getattr(part, name) for part in parts]
        assert all(piece.shape[row_axis(name)] == 2 for piece in pieces), name
        np.testing.assert_array_equal(np.concatenate(pieces, row_axis(name)), whole, err_msg=name)


def test_an_array_that_a_batch_does_not_hold_is_not_held_by_its_parts():
    # Catches None turned into an array of nothing, which a loss would take for a reference policy.
    part = minibatch(make_batch().replace(ref_logp_BC=None, routes_LBTX=None), 0, 2)
    assert part.ref_logp_BC is None and part.routes_LBTX is None and part.old_logp_BC.shape == (3, 3)


class Aux(NamedTuple):
    logp_BC: jax.Array
    routes_LBTX: jax.Array
    nothing_BC: jax.Array | None = None


@pytest.mark.parametrize("micro_batch_size", [0, 1, 2, 3, 6])
def test_an_accumulated_gradient_is_that_of_the_whole_mean(micro_batch_size):
    # Catches a mean of means (the rows hold 0 to 5 tokens), a count of the last part, rows that come back in dealt
    # order.
    rng = np.random.default_rng(1)
    x = rng.standard_normal((6, 3)).astype(np.float32)
    mask = np.array([[1, 1, 1], [0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1], [0, 0, 1]], np.float32)
    batch = make_batch().replace(old_logp_BC=x, loss_mask_BC=mask)

    def loss_fn(params, part):
        value_BC = jnp.sin(params["w"] * part.old_logp_BC)
        return jnp.sum(value_BC * part.loss_mask_BC), (jnp.sum(part.loss_mask_BC), Aux(value_BC, part.routes_LBTX))

    grads, aux = jax.jit(accumulated_gradient, static_argnums=(0, 3))(
        loss_fn, {"w": jnp.float32(0.7)}, batch, micro_batch_size
    )
    w = np.float64(np.float32(0.7))
    assert float(grads["w"]) == pytest.approx(np.sum(mask * x * np.cos(w * x)) / mask.sum(), rel=1e-5)
    np.testing.assert_allclose(aux.logp_BC, np.sin(w * x), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(aux.routes_LBTX, batch.routes_LBTX)
    assert aux.nothing_BC is None


def test_a_batch_without_a_token_in_its_loss_gives_a_gradient_of_zero():
    # Catches 0/0: one rollout of zero-variance groups, all filtered out, would end the run in NaN.
    batch = make_batch().replace(loss_mask_BC=np.zeros((6, 3), np.float32))

    def loss_fn(params, part):
        return jnp.sum(params * part.loss_mask_BC), (
            jnp.sum(part.loss_mask_BC),
            Aux(part.old_logp_BC, part.routes_LBTX),
        )

    grads, _ = accumulated_gradient(loss_fn, jnp.float32(1), batch, 3)
    assert float(grads) == 0


@pytest.mark.parametrize(("rows", "size"), [(6, 4), (6, 12), (7, 2)])
def test_rows_that_do_not_come_out_even_are_refused(rows, size):
    # Catches larger micro-batches than were asked for, which is how a run that fitted in memory no longer does.
    with pytest.raises(AssertionError):
        num_parts(rows, size)


def test_the_number_of_parts_is_rows_over_size_and_one_for_zero():
    # Catches 0 read as "no rows".
    assert [num_parts(12, size) for size in (0, 12, 4, 1)] == [1, 1, 3, 12]
    aux = Aux(jnp.arange(6).reshape(3, 2), jnp.arange(12).reshape(3, 1, 2, 2, 1))
    assert undeal_fields(aux).logp_BC.shape == (6,) and undeal_fields(aux).routes_LBTX.shape == (1, 6, 2, 1)
