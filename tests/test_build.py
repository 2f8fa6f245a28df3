"""Config -> plans: what is read, what is laid over what, what is refused."""

import pytest

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
