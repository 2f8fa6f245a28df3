"""ModelSpec: what cannot be built is refused with the field's name."""

import dataclasses

import pytest

from gspo.model.spec import ModelSpec
from gspo.types import UserError
from tests.model_oracle import DENSE, MOE


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_kv_heads", 3),
        ("head_width", 5),
        ("dtype", "float16"),
        ("moe_backend", "sparse"),
        ("experts_per_token", 6),
        ("d_expert", 0),
        ("num_layers", 0),
        ("router", "tanh"),
        ("rotary_width", 3),
        ("rotary_width", 8),
        ("dense_layers", (2,)),
        ("dense_layers", (0, 1)),
        ("dense_layers", (-1,)),
        ("routed_scale", 0.0),
        ("d_shared", -1),
        ("shared_gate", True),
        ("rope_scaling", (8.0, 4.0, 1.0, 64.0)),
        ("rope_scaling", ("ntk", 4.0)),
        ("qk_norm_over", "layer"),
        ("attention_chunk", -1),
    ],
)
def test_a_spec_that_cannot_be_built_is_a_one_line_error_that_names_the_field(field, value):
    # Catches a shape error from deep inside a matmul, or none at all, for a mistake in a config.
    with pytest.raises(UserError, match=f"^model.{field.replace('num_kv_heads', 'num_heads')}=") as error:
        dataclasses.replace(MOE, **{field: value})
    assert "\n" not in str(error.value)


def test_a_dense_spec_needs_its_feed_forward_width():
    # Catches a dense model of width 0, which would train and learn nothing in its feed-forward layers.
    with pytest.raises(UserError, match="d_ff"):
        ModelSpec(vocab_size=8, num_layers=1, d_model=8, num_heads=1, num_kv_heads=1, head_width=8)
    assert hash(dataclasses.replace(DENSE)) == hash(DENSE)
