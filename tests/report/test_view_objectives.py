"""The objectives of the page, run in Node, against the library's own on the same numbers."""

import json
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspo.objectives import make_objective, settings
from gspo.report.view.page import SOURCES
from gspo.types import LossInputs

NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="there is no `node` to run the page's script in")

LISTED = ("grpo", "gspo", "gspo_token", "cispo", "sapo", "gmpo")  # what the page switches between
CASES = {name: settings(name) for name in (*LISTED, "dapo", "dr_grpo", "luspo", "minirl", "ppo", "reinforce")}
CASES |= {
    "wide gspo": settings("gspo", epsilon=0.05, epsilon_high=0.03),
    "tight gspo_token": settings("gspo_token", epsilon=0.02, epsilon_high=0.02),
    "tight cispo": settings("cispo", epsilon=0.1, epsilon_high=0.1),
    "tight gmpo": settings("gmpo", epsilon=0.05, epsilon_high=0.0625),
    "open gspo": settings("gspo", epsilon=1e9, epsilon_high=1e9),
    "open grpo": settings("grpo", epsilon=1e9, epsilon_high=1e9),
    "two-sided": settings("grpo", delta=2.0),
    "product": settings(None, importance_sampling_level="sequence_sum"),
    "fixed length": settings("dr_grpo", loss_norm_length=11),
}

DRIVER = """
const {batches, cases} = JSON.parse(require("fs").readFileSync(0, "utf8"));
const out = batches.map((batch) => Object.fromEntries(Object.entries(cases).map(([name, settings]) => {
  const found = weigh(settings, {...batch, counts: () => batch.count});
  return [name, {low: [...found.low], high: [...found.high], weight: [...found.weight]}];
})));
console.log(JSON.stringify(out));
"""


SHAPE = (20, 9)  # of all batches, so that one compilation serves them; rows and columns behind them are masked


def batch_of(logp_BC, old_logp_BC, advantages_BC, mask_BC):
    B, C = mask_BC.shape
    frame = ((0, SHAPE[0] - B), (0, SHAPE[1] - C))
    floats = (np.pad(np.asarray(x, np.float64), frame) for x in (logp_BC, old_logp_BC, advantages_BC))
    return LossInputs(*floats, np.pad(mask_BC, frame))


def random_batch(seed, spread, per_token=False):
    """6 rows of up to 9 tokens: an empty one, one with holes, advantages of 0, and pads that hold NaN and infinity."""
    rng = np.random.default_rng(seed)
    B, C = 6, 9
    mask = np.arange(C) < rng.integers(1, C + 1, B)[:, None]
    mask[2] = False
    mask[3] = rng.integers(0, 2, C).astype(bool)
    mask[3, 0] = True
    old = -rng.exponential(size=(B, C))
    logp = old + spread * rng.normal(size=(B, C))
    advantages = rng.normal(size=(B, C if per_token else 1)) * (rng.random((B, 1)) < 0.85) * np.ones((B, C))
    logp[~mask], old[~mask] = np.nan, -np.inf
    return batch_of(logp, old, advantages, mask)


def edge_batch():
    """Log-ratios on the edges themselves, at the cap of 20 and past it, where exp underflows, at 0; both signs."""
    edges = [0.0, 0.0625, -0.05, 0.4, -0.4, 20.0, 20.5, 400.0, -400.0, 1e-12]
    old = np.full((2 * len(edges), 3), -1.0)
    advantages = np.repeat([1.0, -1.0], len(edges))[:, None] * np.ones((1, 3))
    log_w = np.concatenate([edges, edges])[:, None] * np.ones((1, 3))
    # exact in float64, so that both sides see the very same log-ratio: old is -1 - x where x is large
    logp = np.where(log_w > 0, -1.0, -1.0 + log_w)
    old = logp - log_w
    return batch_of(logp, old, advantages, np.ones((2 * len(edges), 3), bool))


BATCHES = [random_batch(0, 0.02), random_batch(1, 0.3), random_batch(2, 1.5), random_batch(3, 0.3, True), edge_batch()]


def as_json(batch):
    """The batch as the page has it: real tokens alone, one row after the other; a row's holes stay in, masked."""
    B, C = batch.mask_BC.shape
    lengths = [int(np.flatnonzero(row)[-1]) + 1 if row.any() else 0 for row in batch.mask_BC]
    flat = [(i, t) for i in range(B) for t in range(lengths[i])]
    pick = lambda x: [float(np.nan_to_num(x[i, t], posinf=9.0, neginf=-9.0)) for i, t in flat]  # noqa: E731
    return flat, {
        "logp": pick(batch.logp_BC), "old_logp": pick(batch.old_logp_BC), "advantage": pick(batch.advantages_BC),
        "mask": [int(batch.mask_BC[i, t]) for i, t in flat],
        "start": np.concatenate([[0], np.cumsum(lengths)]).tolist(),
        "count": {"rows": int(batch.mask_BC.any(1).sum()), "tokens": int(batch.mask_BC.sum()), "width": C},
    }  # fmt: skip


@pytest.fixture(scope="module")
def in_node():
    """[batch][case] what the page's script says."""
    program = (SOURCES / "objectives.js").read_text() + DRIVER
    given = json.dumps({"batches": [as_json(batch)[1] for batch in BATCHES], "cases": CASES})
    done = subprocess.run([NODE, "-e", program], input=given, text=True, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def in_library():
    """[batch][case] (low_BC, high_BC, weight_BC) in float64: what is clipped, and the gradient of minus the loss."""

    def of_case(settings_, inputs):
        objective = make_objective(**settings_)
        weight_BC = jax.grad(lambda logp_BC: -objective(inputs.replace(logp_BC=logp_BC))[0].value)(inputs.logp_BC)
        floats = {name: getattr(inputs, name) for name in ("logp_BC", "old_logp_BC", "advantages_BC")}
        clean = inputs.replace(**{name: jnp.where(inputs.mask_BC, x, 0) for name, x in floats.items()})
        log_ratio_BC = objective.log_ratio(clean.logp_BC, clean.old_logp_BC, clean.mask_BC)
        gain = objective.surrogate(log_ratio_BC, clean)
        cut = (jnp.broadcast_to(side_BC, inputs.mask_BC.shape) & inputs.mask_BC for side_BC in gain[1:])
        return *cut, weight_BC

    with jax.enable_x64(True):
        function = jax.jit(lambda inputs: {name: of_case(case, inputs) for name, case in CASES.items()})
        found = [jax.device_get(function(jax.tree.map(jnp.asarray, batch))) for batch in BATCHES]
    assert found[0]["grpo"][2].dtype == np.float64
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_page_clips_and_weighs_as_the_library_does(in_node, in_library, name):
    # Catches a sign, an edge, a mean or a stopped gradient that the page has otherwise than gspo/objectives.
    for number, batch in enumerate(BATCHES):
        got, (low_BC, high_BC, weight_BC), (flat, _) = in_node[number][name], in_library[number][name], as_json(batch)
        where = tuple(np.array(flat).T)
        np.testing.assert_array_equal(np.array(got["low"], bool), low_BC[where], err_msg=f"batch {number}")
        np.testing.assert_array_equal(np.array(got["high"], bool), high_BC[where], err_msg=f"batch {number}")
        np.testing.assert_allclose(got["weight"], weight_BC[where], rtol=1e-9, atol=1e-15, err_msg=f"batch {number}")
        assert not weight_BC[~batch.mask_BC].any()


def test_the_batches_reach_what_they_are_for(in_node):
    # Catches batches on which nothing is clipped, so that the test above would compare zeros.
    for name in LISTED:
        low, high = (sum(map(sum, (found[name][side] for found in in_node))) for side in ("low", "high"))
        assert (high > 0) != (name == "sapo"), (name, low, high)
        assert (low > 0) != (name in ("sapo", "cispo")), (name, low, high)  # CISPO has no lower bound: ε = 1
        assert any(0 < sum(found[name]["high"]) < len(found[name]["high"]) for found in in_node) or name == "sapo"
        assert any(map(any, (found[name]["weight"] for found in in_node)))


def test_the_library_in_float32_clips_the_same_random_tokens(in_node):
    # Catches a page that agrees with the library at a precision in which no run is made.
    clipped = lambda name, inputs: make_objective(**CASES[name])(inputs)[1]["clip_ratio/tokens"].total  # noqa: E731
    function = jax.jit(lambda inputs: {name: clipped(name, inputs) for name in LISTED})
    for number in (1, 2, 3):
        single = jax.tree.map(lambda x: jnp.asarray(x, x.dtype if x.dtype == bool else jnp.float32), BATCHES[number])
        for name, total in function(single).items():
            cut = np.array(in_node[number][name]["low"], bool) | np.array(in_node[number][name]["high"], bool)
            assert float(total) == cut.sum(), (number, name)
