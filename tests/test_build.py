"""Config -> plans: what is read, what is laid over what, what is refused."""

import pytest

from configs import base, gspo_running_sum, objectives
from gspo import build
from gspo.types import UserError
from tests.tiny_runs import rl_config


def test_fields_of_the_objective_are_laid_over_the_preset_and_none_leaves_it_alone(tmp_path):
    # Catches a preset that wins over the user's field, and None taken for a value.
    settings = build.rl_plan(rl_config(tmp_path, **{"objective.preset": "grpo", "objective.epsilon": 0.1})).objective
    assert (settings["importance_sampling_level"], settings["epsilon"], settings["epsilon_high"]) == (
        "token",
        0.1,
        0.27,
    )
    settings = build.rl_plan(rl_config(tmp_path)).objective
    assert (settings["importance_sampling_level"], settings["epsilon"], settings["epsilon_high"]) == (
        "sequence",
        3e-4,
        4e-4,
    )


@pytest.mark.parametrize("value", [0, -1])
def test_a_number_that_must_be_positive_is_named_with_its_section(tmp_path, value):
    # Catches eval.num_prompts reported as num_prompts.
    with pytest.raises(UserError, match=f"^eval.num_prompts={value}: must be positive"):
        build.rl_plan(rl_config(tmp_path, **{"eval.num_prompts": value}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_num_seqs": -1}, r"max_num_seqs=-1: must be >= 0 \(0: all rows at once\)"),
        ({"max_num_seqs": 4, "mismatch.router_noise": 0.1}, "max_num_seqs=4: .*router_noise.*set max_num_seqs=0"),
        ({"max_num_seqs": 4, "mismatch.expert_swap": 0.1}, "max_num_seqs=4: .*expert_swap.*set max_num_seqs=0"),
    ],
)
def test_rows_at_a_time_that_cannot_be_are_refused(tmp_path, changes, message):
    # Catches a negative number taken for "all", and noise of a step under which a row would depend on its slot.
    with pytest.raises(UserError, match=f"^{message}$"):
        build.rl_plan(rl_config(tmp_path, old_logps="learner", **changes))


def test_a_z_loss_on_a_sigmoid_router_is_refused(tmp_path):
    # Catches a loss that pulls the sum of all scores to one.
    changes = {"model.router": "sigmoid", "router_z_loss_coef": 0.1}
    with pytest.raises(UserError, match=r"^router_z_loss_coef=0\.1: .*model\.router='sigmoid' has not; set it to 0$"):
        build.rl_plan(rl_config(tmp_path, **changes))


def test_rows_that_devices_would_share_are_those_of_all_runs_of_a_config():
    # Catches a cold start, a micro-batch or an arm whose rows two devices cannot share, found after the devices were
    # made; and devices along an axis that the user has not left open.
    config = gspo_running_sum.get_config()
    assert build.rows_to_divide(config) == (64, 128)
    config.micro_batch_size = 32
    assert build.rows_to_divide(config) == (64, 32)
    several = objectives.get_config()
    assert sorted(build.rows_to_divide(several)) == [64, 128, 128]
    several.arms.GRPO.micro_batch_size = 3
    assert build.rows_to_divide(several) == ()
    config.max_num_seqs = 48
    assert build.rows_to_divide(config) == (64, 32, 48)
    config.mesh.fsdp = 2
    assert build.rows_to_divide(config) == ()
    config = base.sft()
    assert build.rows_to_divide(config) == (128,)
    config.mesh.data = 1
    assert build.rows_to_divide(config) == ()
    config = base.dpo()  # whose pairs stay together
    assert build.rows_to_divide(config) == (64,)
    config.micro_batch_size = 32
    assert build.rows_to_divide(config) == (16,)


def test_a_config_of_preferences_is_not_one_of_demonstrations():
    # Catches a run that imitates what was to be compared.
    with pytest.raises(UserError, match=r"experiments/reward_model\.py or experiments/dpo\.py"):
        build.sft_plan(base.reward_model())
    assert [type(build.run_plan(make())).__name__ for make in (base.reward_model, base.dpo, base.sft, base.rl)] == [
        "RewardModelPlan", "DPOPlan", "SFTPlan", "RLPlan"
    ]  # fmt: skip
