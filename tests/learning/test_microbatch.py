"""Rows in parts: nothing lost, nothing twice, nothing out of order; and gradients that do not see the split."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspo.learning.microbatch import (
    accumulated_gradient,
    merge_record,
    merge_rows,
    minibatch,
    num_parts,
    shuffled_units,
    split_rows,
)
from gspo.types import Batch, LossInputs, array


def make_batch(rows=6):
    """A batch with every optional array, of the shape that its name says; no two entries of an array are alike."""
    sizes = {"L": 2, "B": rows, "C": 3, "T": 5, "X": 2, "E": 4}
    rng = np.random.default_rng(0)

    def filled(record):
        arrays = {}
        for name in record.__dataclass_fields__:
            if name == "inputs":
                arrays[name] = filled(LossInputs)
                continue
            shape = [sizes[letter] for letter in name.rsplit("_")[-1]]
            arrays[name] = rng.permutation(np.prod(shape)).reshape(shape).astype(np.float32)
        return record(**arrays)

    return filled(Batch)


def arrays_of(batch):
    """Name -> array, of the batch and of its inputs."""
    return {name: x for name, x in (vars(batch) | vars(batch.inputs)).items() if name != "inputs"}


def row_axis(name):
    return name.rsplit("_")[-1].index("B")


def test_splitting_and_merging_rows_are_inverse_and_keep_every_row_once():
    # Catches a reshape in the wrong order: rows would mix with their neighbours' routes.
    x = np.arange(2 * 6 * 3).reshape(2, 6, 3)
    split = split_rows(x, 3, axis=1)
    assert split.shape == (3, 2, 2, 3)
    for part in range(3):
        np.testing.assert_array_equal(split[part], x[:, part::3])
    np.testing.assert_array_equal(merge_rows(split, axis=1), x)
    np.testing.assert_array_equal(merge_rows(split_rows(x[0], 2)), x[0])


def test_units_of_rows_stay_together_and_are_dealt_like_cards():
    # Catches micro-batches that tear groups apart, and rows that come back in another order.
    x = np.arange(2 * 12 * 3).reshape(2, 12, 3)
    split = split_rows(x, 3, axis=1, unit=2)
    assert split.shape == (3, 2, 4, 3)
    for part in range(3):
        rows = [2 * part, 2 * part + 1, 2 * part + 6, 2 * part + 7]
        np.testing.assert_array_equal(split[part], x[:, rows])
    np.testing.assert_array_equal(merge_rows(split, axis=1, unit=2), x)
    np.testing.assert_array_equal(merge_rows(split_rows(x[0], 3, unit=4), unit=4), x[0])


def test_minibatches_are_the_rollout_cut_in_order_with_its_old_log_probs():
    # Catches old log-probs recomputed between updates (the ratio would stay 1), rows trained twice, an array cut along
    # its layers.
    batch = make_batch()
    parts = [minibatch(batch, j, 3) for j in range(3)]
    for name, whole in arrays_of(batch).items():
        pieces = [arrays_of(part)[name] for part in parts]
        assert all(piece.shape[row_axis(name)] == 2 for piece in pieces), name
        np.testing.assert_array_equal(np.concatenate(pieces, row_axis(name)), whole, err_msg=name)


def test_an_array_that_a_batch_does_not_hold_is_not_held_by_its_parts():
    # Catches None turned into an array of nothing, which a loss would take for a reference policy.
    batch = make_batch()
    inputs = batch.inputs.replace(ref_logp_BC=None)
    part = minibatch(batch.replace(inputs=inputs, replayed_routes_LBTX=None), 0, 2)
    assert part.inputs.ref_logp_BC is None and part.replayed_routes_LBTX is None
    assert part.inputs.old_logp_BC.shape == (3, 3)


@flax.struct.dataclass
class Aux:
    logp_BC: jax.Array = array("BC")
    routes_LBTX: jax.Array = array("LBTX")
    nothing_BC: jax.Array | None = array("BC", default=None)


@pytest.mark.parametrize("micro_batch_size", [0, 1, 2, 3, 6])
def test_an_accumulated_gradient_is_that_of_the_whole_mean(micro_batch_size):
    # Catches a mean of means (the rows hold 0 to 5 tokens), a count of the last part, rows that come back in split
    # order.
    rng = np.random.default_rng(1)
    x = rng.standard_normal((6, 3)).astype(np.float32)
    mask = np.array([[1, 1, 1], [0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1], [0, 0, 1]], np.float32)
    batch = make_batch()
    batch = batch.replace(inputs=batch.inputs.replace(old_logp_BC=x, mask_BC=mask))

    def loss_fn(params, part):
        value_BC = jnp.sin(params["w"] * part.inputs.old_logp_BC)
        return jnp.sum(value_BC * part.inputs.mask_BC), (
            jnp.sum(part.inputs.mask_BC),
            Aux(value_BC, part.old_routes_LBTX),
        )

    grads, aux = jax.jit(accumulated_gradient, static_argnums=(0, 3))(
        loss_fn, {"w": jnp.float32(0.7)}, batch, micro_batch_size
    )
    w = np.float64(np.float32(0.7))
    assert float(grads["w"]) == pytest.approx(np.sum(mask * x * np.cos(w * x)) / mask.sum(), rel=1e-5)
    np.testing.assert_allclose(aux.logp_BC, np.sin(w * x), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(aux.routes_LBTX, batch.old_routes_LBTX)
    assert aux.nothing_BC is None


def test_a_batch_without_a_token_in_its_loss_gives_a_gradient_of_zero():
    # Catches 0/0: one rollout of zero-variance groups, all filtered out, would end the run in NaN.
    batch = make_batch()
    batch = batch.replace(inputs=batch.inputs.replace(mask_BC=np.zeros((6, 3), np.float32)))

    def loss_fn(params, part):
        return jnp.sum(params * part.inputs.mask_BC), (
            jnp.sum(part.inputs.mask_BC),
            Aux(part.inputs.old_logp_BC, part.old_routes_LBTX),
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
    assert merge_record(aux).logp_BC.shape == (6,) and merge_record(aux).routes_LBTX.shape == (1, 6, 2, 1)


@pytest.mark.parametrize("unit", [1, 3])
def test_shuffled_rows_are_all_there_with_all_that_belongs_to_them(unit):
    # Catches rows that lose their advantage or their old log-probs, a row twice, groups torn apart, an order that does
    # not depend on the key.
    batch, rows = make_batch(12), np.arange(12)
    places = []
    for seed in range(3):
        mixed = arrays_of(shuffled_units(batch, jax.random.key(seed), unit))
        first = np.asarray(mixed["prompt_lengths_B"])
        order = np.array([int(np.flatnonzero(batch.prompt_lengths_B == x)[0]) for x in first])
        assert sorted(order) == rows.tolist()
        units = order.reshape(-1, unit)
        assert (units % unit == np.arange(unit)).all() and (np.diff(units, axis=1) == 1).all()
        for name, x in arrays_of(batch).items():
            np.testing.assert_array_equal(mixed[name], np.take(x, order, row_axis(name)))
        places.append(order.tolist())
    assert len(set(map(tuple, places))) == 3 and rows.tolist() not in places
