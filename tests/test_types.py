"""Records declare the dimensions of their arrays; what cuts and places them reads the declaration."""

import dataclasses
import importlib
import pkgutil

import flax.struct
import numpy as np
import pytest

import gspo
from gspo.types import LossInputs, Rollout, array, map_arrays, row_axis

WITHOUT_ARRAYS_OF_THE_FRAME = {"TrainState", "Mean", "Max", "Min", "Last"}  # trees of any shape; sums of any shape


def records():
    """Every flax struct of the library that holds arrays of rows."""
    found = {}
    for module in pkgutil.walk_packages(gspo.__path__, "gspo."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if (
                isinstance(value, type)
                and hasattr(value, "_flax_dataclass")
                and name not in WITHOUT_ARRAYS_OF_THE_FRAME
            ):
                found[name] = value
    return found


@pytest.mark.parametrize("name", sorted(records()))
def test_every_field_of_a_record_declares_the_dimensions_that_its_name_says(name):
    # Catches a field that is added without a declaration (rows would be cut along another axis, or not at all), and one
    # that is declared as another array.
    for field in dataclasses.fields(records()[name]):
        if name in ("DecodeState", "Slots") and field.name == "caches":
            continue  # a tuple of records, each of which is checked by itself
        if field.type in (LossInputs, "LossInputs") or getattr(field.type, "__name__", "") in records():
            continue
        dims = field.metadata.get("dims")
        assert dims is not None, f"{name}.{field.name} declares no dimensions"
        suffix = field.name.rpartition("_")[2]
        assert dims == (suffix if suffix.isupper() else ""), f"{name}.{field.name}"


def test_the_records_that_this_file_checks_are_found():
    # Catches a search that finds nothing, after which the test above would pass on nothing.
    assert {
        "Rollout",
        "Batch",
        "LossInputs",
        "Scores",
        "Frames",
        "Values",
        "DecodeState",
        "KVCache",
        "StackedCache",
    } <= records().keys()


def test_a_field_that_nobody_declared_is_refused_and_none_and_records_pass_through():
    # Catches an array that silently stays whole while the rows beside it are cut.
    @flax.struct.dataclass
    class Outer:
        rollout: Rollout
        plain_B: np.ndarray
        missing_BC: np.ndarray | None = array("BC", default=None)
        several: tuple[Rollout, ...] = ()

    x = np.ones((2, 3))
    rollout = Rollout(x, x[:, 0], x[:, 0], x, None, x[:, 0], x[0, 0])
    with pytest.raises(TypeError, match=r"Outer\.plain_B declares no dimensions"):
        map_arrays(lambda dims, x: x, Outer(rollout, x[:, 0]))
    seen = []
    mapped = map_arrays(lambda dims, x, y: seen.append(dims) or x + y, Outer(rollout, None), Outer(rollout, None))
    assert mapped.missing_BC is None and mapped.rollout.routes_LBTX is None
    assert seen == ["BT", "B", "B", "BC", "B", ""]
    pair = Outer(rollout, None, several=(rollout, rollout))
    doubled = map_arrays(lambda dims, x, y: x + y, pair, pair)
    assert len(doubled.several) == 2 and np.array_equal(doubled.several[1].tokens_BT, 2 * x)


def test_rows_lie_where_their_letter_stands():
    # Catches layers taken for rows.
    assert [row_axis(dims) for dims in ("B", "BT", "LBTX", "LBKHC")] == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="substring not found"):
        row_axis("LTX")
