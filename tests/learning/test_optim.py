"""The optimizer against a float64 AdamW loop; schedules; what is decayed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspo.learning.optim import decays, lr_factors, make_optimizer, make_schedule, read_lr_scale
from gspo.types import UserError


def run(optimizer, params, grads):
    update = jax.jit(optimizer.update)
    state = optimizer.init(params)
    for grad in grads:
        updates, state = update(grad, state, params)
        params = jax.tree.map(lambda p, u: p + u, params, updates)
    return params


def adamw_oracle(params, grads, rates, beta1, beta2, eps, weight_decay, max_grad_norm):
    """float64; params and grads: {name: array}; names that end in scale or bias are not decayed."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    m, v = ({name: np.zeros_like(value) for name, value in p.items()} for _ in range(2))
    for t, (grad, rate) in enumerate(zip(grads, rates, strict=True), start=1):
        norm = np.sqrt(sum(float(np.sum(np.asarray(g, np.float64) ** 2)) for g in grad.values()))
        shrink = min(1.0, max_grad_norm / norm)
        for name in p:
            g = np.asarray(grad[name], np.float64) * shrink
            m[name] = beta1 * m[name] + (1 - beta1) * g
            v[name] = beta2 * v[name] + (1 - beta2) * g * g
            step = (m[name] / (1 - beta1**t)) / (np.sqrt(v[name] / (1 - beta2**t)) + eps)
            p[name] = p[name] - rate * (step + (0 if name in ("scale", "bias") else weight_decay * p[name]))
    return p


def test_updates_equal_adamw_written_out_in_float64():
    # Catches: clipping after Adam, decay through the moments (L2), a rate off by one update, decay on norms.
    rng = np.random.default_rng(0)
    shapes = {"kernel": (3, 4), "scale": (2, 4), "bias": (4,), "embedding": (5, 3)}
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    grads = [{name: jnp.asarray(rng.normal(size=shape) * size, jnp.float32) for name, shape in shapes.items()}
             for size in (5.0, 0.01, 1.0, 3.0, 0.1, 2.0)]  # fmt: skip
    options = {"beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.1, "max_grad_norm": 1.5}
    optimizer = make_optimizer(learning_rate=0.01, schedule="linear", warmup_steps=2, total_steps=6, **options)
    rates = [0.005, 0.01, 0.01, 0.0075, 0.005, 0.0025]
    want = adamw_oracle(params, grads, rates, **options)
    got = run(optimizer, params, grads)
    for name in shapes:
        np.testing.assert_allclose(got[name], want[name], rtol=2e-5, atol=2e-6, err_msg=name)


@pytest.mark.parametrize(("schedule", "want"), [
    ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]),
    ("cosine", [0.5, 1.0, 1.0, 0.8535533905932737, 0.5, 0.1464466094067263, 0.0]),
])  # fmt: skip
def test_the_learning_rate_warms_up_and_decays_to_zero_after_the_last_update(schedule, want):
    # Catches: a first update with rate zero, a decay that ends early or late, warm-up counted in the decay.
    learning_rate_at = make_schedule(learning_rate=2.0, schedule=schedule, warmup_steps=2, total_steps=6)
    np.testing.assert_allclose([float(learning_rate_at(step)) for step in range(7)], np.array(want) * 2, atol=1e-6)
    assert float(jax.jit(learning_rate_at)(jnp.int32(4))) == pytest.approx(2 * want[4])
    assert float(learning_rate_at(100)) == (2.0 if schedule == "constant" else 0.0)


def test_a_constant_rate_needs_no_steps_and_large_step_counts_stay_exact():
    # Catches: a default that divides by zero; int32 steps that overflow.
    learning_rate_at = make_schedule(learning_rate=1e-6)
    assert [float(learning_rate_at(step)) for step in (0, 10**9)] == [pytest.approx(1e-6)] * 2


def test_weight_decay_spares_scales_and_biases_by_name_whatever_their_rank():
    # Catches: the stacked [L, D] scales of scanned layers decayed because they look like matrices.
    params = {"layers": {"norm": {"scale": jnp.ones((3, 4))},
                         "query": {"kernel": jnp.ones((3, 4, 4)), "bias": jnp.ones((3, 4))},
                         "scale": {"kernel": jnp.ones(2)}}, "embedding": jnp.ones((5, 4))}  # fmt: skip
    assert decays(params) == {"layers": {"norm": {"scale": False}, "query": {"kernel": True, "bias": False},
                                         "scale": {"kernel": True}}, "embedding": True}  # fmt: skip


def test_a_learning_rate_of_zero_changes_nothing_even_with_decay():
    # Catches: decay that does not pass through the learning rate.
    params = {"kernel": jnp.arange(4.0)}
    got = run(make_optimizer(learning_rate=0.0, weight_decay=0.5), params, [{"kernel": jnp.ones(4)}])
    assert (got["kernel"] == params["kernel"]).all()


def test_without_a_norm_limit_gradients_are_not_clipped():
    # Catches: None read as zero. With eps much larger than the gradients, Adam's step is proportional to them.
    params = {"kernel": jnp.zeros(2)}

    def step(max_grad_norm):
        optimizer = make_optimizer(learning_rate=1.0, eps=1e6, max_grad_norm=max_grad_norm)
        return float(run(optimizer, params, [{"kernel": jnp.array([3.0, 4.0])}])["kernel"][1])

    assert step(None) == pytest.approx(-4e-6, rel=1e-4)
    assert step(1.0) == pytest.approx(-0.8e-6, rel=1e-4)


def test_an_unknown_schedule_names_the_nearest_one():
    # Catches: a KeyError, or a misspelt schedule taken for the default.
    with pytest.raises(UserError, match="did you mean 'cosine'"):
        make_optimizer(learning_rate=1e-3, schedule="cosin", total_steps=10)


@pytest.mark.parametrize("options", [
    {"learning_rate": -1.0}, {"learning_rate": float("nan")}, {"schedule": "linear"}, {"beta1": 1.0}, {"eps": 0.0},
    {"schedule": "cosine", "warmup_steps": 10, "total_steps": 10}, {"weight_decay": -0.1}, {"max_grad_norm": 0.0},
    {"lr_scale": "router"}, {"lr_scale": "router=-1"}, {"lr_scale": "=2"}, {"lr_scale": "(=2"}, {"lr_scale": "a=inf"},
])  # fmt: skip
def test_settings_that_cannot_work_are_one_line_errors(options):
    # Catches: NaN parameters at the first update, or a decay that never happens.
    with pytest.raises(UserError) as error:
        make_optimizer(**{"learning_rate": 1e-3} | options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("scale", [0.0, 0.1])
def test_routers_learn_at_their_own_rate_and_not_at_all_at_zero(scale):
    # Catches a frozen router that still decays or fills the gradient norm, and a scale that Adam divides away again.
    params = {"moe": {"router": jnp.ones((2, 3)), "gate": jnp.ones((2, 3))}}
    grads = {"moe": {"router": jnp.full((2, 3), 100.0), "gate": jnp.full((2, 3), 0.01)}}
    settings = {"learning_rate": 0.1, "weight_decay": 0.5, "max_grad_norm": 1.0}
    moved = {}
    for name, lr_scale in (("scaled", f"router={scale}"), ("plain", "")):
        optimizer = make_optimizer(**settings, lr_scale=lr_scale)
        moved[name] = optimizer.update(grads, optimizer.init(params), params)[0]["moe"]
    np.testing.assert_allclose(moved["scaled"]["router"], scale * moved["plain"]["router"], rtol=1e-6)
    assert float(jnp.abs(moved["plain"]["router"]).min()) > 0.1
    # Adam forgets a gradient's scale, but for eps.
    np.testing.assert_allclose(moved["scaled"]["gate"], moved["plain"]["gate"], rtol=1e-3)


def test_the_first_pattern_that_is_in_a_name_gives_its_factor_and_each_must_be_in_one():
    # Catches a last match that wins, a pattern that only whole names match, and a misspelt one that does nothing.
    params = {
        "blocks": {"moe": {"router": jnp.ones(2)}, "attention": {"query": jnp.ones(2), "query_norm": jnp.ones(2)}}
    }
    factors = lr_factors(read_lr_scale("attention/query$=0, attention=3"), params)["blocks"]
    assert factors == {"moe": {"router": 1.0}, "attention": {"query": 0.0, "query_norm": 3.0}}
    with pytest.raises(UserError, match=r"lr_scale: 'rooter'.*blocks/moe/router"):
        lr_factors(read_lr_scale("rooter=2"), params)
