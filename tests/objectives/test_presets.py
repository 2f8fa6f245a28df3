"""Settings: what is refused, what follows from what, what is warned about."""

import functools
import inspect

import pytest

from gspo import objectives
from gspo.objectives import surrogates
from gspo.types import UserError
from tests.loss_arrays import VARIANTS, objective_of


# Catches a message that does not lead to the remedy: the field, what is wrong, the nearest name.
@pytest.mark.parametrize(
    "fields, message",
    [
        ({"surrogate": "cipso"}, r"objective\.surrogate: no 'cipso'; did you mean 'cispo'\?"),
        (
            {"importance_sampling_level": "sequences"},
            r"objective\.importance_sampling_level: .* did you mean 'sequence'\?",
        ),
        ({"loss_agg_mode": "token_mean"}, r"objective\.loss_agg_mode: .* did you mean 'token-mean'\?"),
        ({"kl_loss_type": "k4"}, r"objective\.kl_loss_type: no 'k4'"),
        ({"kl_importance": "yes"}, r"objective\.kl_importance: no 'yes'"),
        ({"sampler_is": "ice-pop"}, r"objective\.sampler_is: .* did you mean 'icepop'\?"),
        ({"epsilonn": 0.1}, r"objective\.epsilonn: no such field; did you mean 'epsilon'\?"),
        ({"epsilon": -0.1}, r"objective\.epsilon: -0.1 will not do"),
        ({"epsilon_high": float("nan")}, r"objective\.epsilon_high: nan will not do"),
        ({"epsilon": True}, r"objective\.epsilon: True will not do"),
        ({"delta": 1.0}, r"objective\.delta: 1.0 will not do; it must exceed 1 \+ epsilon_high"),
        ({"surrogate": "cispo", "delta": 6.0}, r"objective\.delta: the surrogate 'cispo' has no such bound"),
        ({"surrogate": "gmpo"}, r"objective\.importance_sampling_level: 'gmpo'"),
        ({"beta": "0.1"}, r"objective\.beta: '0.1' will not do"),
        ({"temperature_pos": 0}, r"objective\.temperature_pos: 0 will not do"),
        ({"router_shift_floor": 1.5}, r"objective\.router_shift_floor"),
        ({"loss_norm_length": 0}, r"objective\.loss_norm_length"),
        ({"sampler_is": "icepop", "sampler_is_high": 0.1}, r"objective\.sampler_is_high: 0.1 will not do"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_field_and_remedy(fields, message):
    with pytest.raises(UserError, match=message) as error:
        objectives.make_objective(**fields)
    assert "\n" not in str(error.value)


# Catches an override that changes nothing and is taken without a word, and one that is refused without a preset, as by
# `make_objective`, which is given all the fields there are.
@pytest.mark.parametrize(
    "preset, fields, message",
    [
        ("sapo", {"epsilon": 0.1}, "epsilon: the surrogate 'sapo' does not read it, as clip, .* would; leave it out"),
        ("gspo", {"surrogate": "reinforce", "epsilon_high": 0.1}, "epsilon_high: the surrogate 'reinforce' does not"),
        ("grpo", {"cap": 2.0}, "cap: the surrogate 'clip' does not read it, as minirl would; leave it out"),
        ("grpo", {"temperature_neg": 2.0}, "temperature_neg: .* as sapo would; leave it out"),
        ("gspo", {"loss_norm_length": 16}, "loss_norm_length: loss_agg_mode 'seq-mean-token-mean' does not read it"),
        ("gspo", {"sampler_is_low": 0.5}, "sampler_is_low: .*; set sampler_is, or leave it out"),
        ("gspo", {"sampler_is_high": 2.0}, "sampler_is_high: .*; set sampler_is, or leave it out"),
    ],
)
def test_an_override_that_no_part_of_the_objective_reads_is_refused(preset, fields, message):
    with pytest.raises(UserError, match=rf"^objective\.{message}") as error:
        objectives.preset(preset, **fields)
    assert "\n" not in str(error.value)
    objectives.settings(preset, **dict.fromkeys(fields, None))
    objectives.settings(None, **objectives.settings(preset) | fields)


def test_an_unknown_preset_names_the_nearest():  # catches a KeyError at the user
    with pytest.raises(UserError, match=r"objective\.preset: no 'gsop'; did you mean 'gspo'\?"):
        objectives.preset("gsop")


# Catches presets that drift from their papers, defaults that ignore the level, and overrides that are ignored.
def test_clip_ranges_default_by_level_and_give_way_to_overrides():
    def clip_range(name, **overrides):
        s = objectives.settings(name, **overrides)
        return s["epsilon"], s["epsilon_high"]

    assert clip_range("gspo") == clip_range("gspo_token") == (3e-4, 4e-4)
    assert clip_range("grpo") == clip_range("gspo", importance_sampling_level="sequence_sum") == (0.2, 0.27)
    assert clip_range("gspo", importance_sampling_level="token") == (0.2, 0.27)
    assert clip_range("dapo") == (0.2, 0.28) and clip_range("dapo", epsilon_high=0.3) == (0.2, 0.3)
    assert clip_range("gspo", epsilon=3e-3, epsilon_high=None) == (3e-3, 4e-4)
    assert clip_range(None, surrogate="cispo") == (1.0, 4.0) and clip_range("gmpo") == (0.4, 0.4)


def parts_of(objective):
    """The functions of an objective and their constants, which compare by value."""
    plain = lambda f: (f.func, f.keywords) if isinstance(f, functools.partial) else f  # noqa: E731
    return {
        name: [tuple(map(plain, x)) if isinstance(x, tuple) else plain(x) for x in value]
        if isinstance(value, tuple)
        else plain(value)
        for name, value in vars(objective).items()
    }


# Catches settings that change when they are read back from a saved config, and an override that reaches no function.
@pytest.mark.parametrize("name", VARIANTS)
def test_settings_are_idempotent_and_make_the_same_objective(name):
    fields = dict(VARIANTS[name])
    s = objectives.settings(fields.pop("preset"), **fields)
    assert objectives.settings(None, **s) == s
    assert parts_of(objectives.make_objective(**s)) == parts_of(objective_of(name))
    assert parts_of(objective_of(name, beta=0.1)) != parts_of(objective_of(name))


# Catches a constant that the table forgets (the surrogate would not run) or names in vain, and a surrogate without an
# entry.
def test_the_table_of_constants_lists_what_each_surrogate_takes():
    assert surrogates.CONSTANTS.keys() == surrogates.SURROGATES.keys()
    for name, function in surrogates.SURROGATES.items():
        assert set(surrogates.CONSTANTS[name]) == set(inspect.getfullargspec(function).kwonlyargs), name


# Catches silence where a run is set up to show nothing, and noise where it is set up well.
@pytest.mark.parametrize(
    "name, overrides, updates, words",
    [
        ("gspo", {}, 4, []), ("grpo", {}, 4, []), ("dapo", {}, 4, []), ("reinforce", {}, 1, []), ("cispo", {}, 16, []),
        ("gspo", {}, 1, ["same algorithm"]), ("reinforce", {}, 4, ["second update"]),
        ("gspo", {"epsilon": 0.2, "epsilon_high": 0.27}, 4, ["token ratios"]),
        ("dapo", {"importance_sampling_level": "sequence"}, 4, ["token ratios", "token-mean"]),
        ("grpo", {"epsilon": 3e-4, "epsilon_high": 4e-4}, 4, ["nearly everything"]),
        ("gspo", {"epsilon": 3e-3}, 4, ["only one of them"]), ("gspo", {"loss_agg_mode": "token-mean"}, 4, ["length"]),
        ("dr_grpo", {}, 4, ["loss_norm_length"]), ("grpo", {"beta": 0.1, "kl_loss_type": "k1"}, 4, ["no expected "
                                                                                                    "gradient"]),
    ],
)  # fmt: skip
def test_settings_that_are_probably_not_meant_are_warned_about(name, overrides, updates, words):
    found = objectives.warnings_of(objectives.settings(name, **overrides), updates)
    assert len(found) == len(words), found
    assert all(any(word in line for line in found) and "\n" not in "".join(found) for word in words), found
