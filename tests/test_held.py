"""The trees that a run holds: what the log says of them, and how frozen ones are kept between their uses."""

import csv

import jax
import jax.numpy as jnp
import pytest

from configs import models
from gspo import build, held, rl
from gspo.held import HOST, Storage, describe_trees, trees_of
from gspo.run.writers import read_jsonl
from gspo.steps import initial_state
from gspo.types import TrainState, UserError
from scripts import draw_trees
from tests.rl.runs import RESULTS
from tests.tiny_runs import assert_bit_equal, kept_compiles, rl_config, state_of  # noqa: F401 - a fixture

TREE = {"dense": {"kernel": jnp.linspace(-1, 1, 12).reshape(3, 4)}, "norm": {"scale": jnp.full(4, 1.001)}}
ALL = {"reward_kl_coef": 0.1, "critic.enable": True, "mismatch.stale_rollouts": 1, "old_logps": "learner"}


def test_the_table_counts_each_tree_once_and_leaves_the_memory_of_the_host_out_of_the_sum():
    # Catches bytes of the whole array in place of a device's, a count of leaves, a tree that is missing.
    on_host = jax.device_put(TREE, TREE["dense"]["kernel"].sharding.with_memory_kind(HOST))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), TREE)
    critic = TrainState(jnp.int32(0), TREE, (TREE, TREE))
    state = TrainState(jnp.int32(0), half, {"mu": TREE, "count": jnp.int32(1)}, ref_params=on_host, critic=critic)
    assert describe_trees(trees_of(state)) == [
        "held on each device:",
        "  policy              bfloat16  32 bytes",
        "  optimizer           float32   68 bytes",
        "  reference           float32   64 bytes of the host's memory",
        "  critic              float32   64 bytes",
        "  critic's optimizer  float32   128 bytes",
        "  together                      292 bytes",
    ]


def test_a_tree_that_is_cut_over_devices_counts_with_its_part_of_each():
    # Catches the size of the whole.
    mesh = jax.make_mesh((4,), ("fsdp",), devices=jax.devices()[:4])
    cut, whole = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in (("fsdp",), ()))
    tree = [jax.ShapeDtypeStruct((8, 3), "float32", sharding=sharding) for sharding in (cut, whole)]
    assert held.bytes_per_device(tree) == 2 * 3 * 4 + 8 * 3 * 4


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_kept_comes_back_rounded_at_most_and_is_described_as_it_lies(dtype, offload):
    # Catches a tree that is read from the host for each use, one that is rounded twice or not at all, scales that are
    # rounded, a description that a checkpoint could not be restored into.
    storage = Storage("ref_", dtype, offload)
    kept = storage.kept(TREE)
    kernel, scale = kept["dense"]["kernel"], kept["norm"]["scale"]
    assert (kernel.dtype, scale.dtype) == (dtype, jnp.float32)
    assert (kernel.sharding.memory_kind == HOST) == offload
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), TREE)
    said = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), tree)  # noqa: E731
    assert said(storage.abstract(shapes)) == said(kept)
    want = {"dense": {"kernel": TREE["dense"]["kernel"].astype(dtype).astype(jnp.float32)}, "norm": TREE["norm"]}
    assert_bit_equal(storage.fetched(kept), want)
    assert storage.fetched(kept)["dense"]["kernel"].sharding.memory_kind != HOST
    assert (storage.fetched(kept) is TREE) == storage.plain


def test_devices_without_such_memory_refuse_to_offload_in_one_line(monkeypatch):
    # Catches a reference that stays on the device, unsaid.
    monkeypatch.setattr(held, "HOST", "another")
    with pytest.raises(UserError, match=r"^ref_offload=True: cpu devices know no another memory, only device"):
        Storage("ref_", offload=True).kept(TREE)


@pytest.mark.parametrize(("changes", "words"), [
    ({"ref_dtype": "float16", "reward_kl_coef": 0.1}, r"^ref_dtype='float16': choose one of float32, bfloat16"),
    ({"reward_model.dtype": "int8"}, r"^reward_model\.dtype='int8': choose one of"),
    ({"ref_offload": True}, "^ref_dtype, ref_offload: nothing reads the reference"),
    ({"ref_dtype": "bfloat16", "lora.rank": 2, "reward_kl_coef": 0.1}, "^ref_dtype, ref_offload: that of a run with"),
])  # fmt: skip
def test_a_reference_that_cannot_be_kept_so_is_refused(tmp_path, changes, words):
    # Catches a field that does nothing.
    with pytest.raises(UserError, match=words):
        build.rl_plan(rl_config(tmp_path, **changes))


def test_the_state_of_a_run_keeps_its_reference_as_it_was_asked_to(tmp_path):
    # Catches a policy or a critic that is rounded with it, and a description that is not that of the state.
    config = rl_config(tmp_path, **ALL | {"ref_dtype": "bfloat16", "ref_offload": True})
    run = rl.prepare(build.rl_plan(config))
    state = initial_state(build.rl_plan(config), run.steps.start)
    twin = run.steps.abstract.ref_params
    said = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding.memory_kind), tree)  # noqa: E731
    assert said(twin) == said(state.ref_params)
    assert state.ref_params["embedding"].dtype == jnp.bfloat16
    assert {leaf.dtype.name for leaf in jax.tree.leaves((state.params, state.critic.params))} == {"float32"}
    assert [note.split("  ")[1] for note in run.notes[2:9]] == [
        "policy", "optimizer", "reference", "stale copies", "critic", "critic's optimizer", "together",
    ]  # fmt: skip
    assert "bfloat16, float32" in run.notes[4] and run.notes[4].endswith("of the host's memory")


@pytest.mark.slow
def test_runs_whose_reference_lies_in_the_hosts_memory_are_bit_equal_and_go_on(tmp_path):
    # Catches a reference that is lost, donated, or left behind where it should follow.
    changes = {"objective.beta": 0.05, "sync_ref_model": True, "ref_model_sync_steps": 1, "num_rollouts": 2}
    changes |= {"optimizer.learning_rate": 0.02}
    for name, more in {"plain": {}, "host": {"ref_offload": True}}.items():
        config = rl_config(tmp_path, **changes | more)
        rl.train(build.rl_plan(config), tmp_path / name)
        longer = rl_config(tmp_path, **changes | more | {"num_rollouts": 3})
        rl.train(build.rl_plan(longer), tmp_path / name, allow_changed_config=True)
    for name in RESULTS:
        assert (tmp_path / "host" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    plain, host = (
        state_of(rl_config(tmp_path, **changes | more), tmp_path / name)[1]
        for name, more in (("plain", {}), ("host", {"ref_offload": True}))
    )
    assert jax.tree.leaves(host.ref_params)[0].sharding.memory_kind == HOST
    assert_bit_equal(host, plain)


@pytest.mark.slow
def test_a_reference_of_8_bits_of_mantissa_is_near_the_policy_that_it_was_rounded_from(tmp_path):
    # Catches a reference that is not rounded, or is another policy. Updates that move nothing: Adam would make steps of
    # full size of the smallest gradient.
    changes = {"objective.beta": 0.05, "num_rollouts": 1, "optimizer.learning_rate": 1e-9}
    kls = {}
    for dtype in ("float32", "bfloat16"):
        rl.train(build.rl_plan(rl_config(tmp_path, **changes | {"ref_dtype": dtype})), tmp_path / dtype)
        kls[dtype] = read_jsonl(tmp_path / dtype / "metrics.jsonl")[0]["kl"]
    assert kls["float32"] < 1e-9 < kls["bfloat16"] < 1e-3


def test_the_figure_says_which_trees_a_method_holds(tmp_path, monkeypatch):
    monkeypatch.setitem(models.MODELS, "tiny", {"num_layers": 1, "d_model": 8, "vocab_size": 16, "num_experts": 2})
    sizes = draw_trees.held("tiny")
    policy = sizes["GSPO"]["policy"]
    assert sizes["GSPO"] == {"policy": policy, "optimizer": 2 * policy + 8}  # moments of Adam and two counts
    assert sizes["GRPO, beta > 0"]["reference"] == sizes["PPO"]["reference"] == sizes["DPO"]["reference"] == policy
    assert {"critic", "critic's optimizer", "reward model"} <= set(sizes["PPO, reward model"])
    draw_trees.draw(sizes, "tiny", tmp_path / "trees")
    rows = list(csv.DictReader((tmp_path / "trees.csv").open()))
    assert {row["tree"] for row in rows if row["method"] == "DPO" and float(row["GiB"])} == {
        "policy", "optimizer", "reference",
    }  # fmt: skip
