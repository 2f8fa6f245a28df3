"""Experience: dynamic sampling, shaping and comparison, with completions written by hand in place of a sampler."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspo import build
from gspo.collect import Collector
from gspo.data.tokenizer import make_tokenizer
from gspo.generate import prompt_source
from gspo.learning.scores import Scores
from gspo.run.progress import Timer
from gspo.steps import make_layout
from gspo.types import TrainState
from tests import oracles
from tests.tiny_runs import rl_config, written

RIGHT, WRONG = "right", "wrong"


class Pen:
    """A sampler that writes what it is told: one list of groups per call, each completion RIGHT, WRONG or a text."""

    def __init__(self, config, *calls, truncated=()):
        self.tokenizer, self.width, self.truncated = (
            make_tokenizer(config.tokenizer),
            config.max_completion_length,
            truncated,
        )
        self.calls, self.seen = iter(calls), []

    def __call__(self, params, prompt_QP, lengths_Q, key):
        prompts = [
            self.tokenizer.decode(row[-n:]) for row, n in zip(np.asarray(prompt_QP), np.asarray(lengths_Q), strict=True)
        ]
        groups = next(self.calls)
        texts = [
            [{RIGHT: p[-2], WRONG: "="}.get(c, c) for c in group] for p, group in zip(prompts, groups, strict=True)
        ]
        self.seen.append((params, prompts, jax.random.key_data(key).tolist()))
        rollout = written(texts, self.tokenizer, prompt_QP, lengths_Q, width=self.width, truncated=self.truncated)
        return jax.tree.map(jnp.asarray, rollout)


def collect(config, pen, *, cursor=0, state=None, scorer=None, value_fn=None, needs=()):
    plan = build.rl_plan(config)
    tokenizer = make_tokenizer(config.tokenizer)
    source = prompt_source(plan.data, "train", tokenizer)
    steps = SimpleNamespace(
        layout=make_layout(plan.mesh), rollout_params=lambda params: params, sampler=pen, scorer=scorer,
        value_fn=value_fn, objective=SimpleNamespace(needs=needs),
    )  # fmt: skip
    collector = Collector(plan, steps, tokenizer, source)
    state = TrainState(jnp.int32(0), "params", None) if state is None else state
    return collector(state, cursor, jax.random.key(0), Timer())


def tokens_of(experience, config):
    P = experience.batch.tokens_BT.shape[1] - config.max_completion_length
    return [
        row[P : P + n].tolist()
        for row, n in zip(experience.batch.tokens_BT, experience.batch.completion_lengths_B, strict=True)
    ]


MIXED, SAME, NONE = [RIGHT, WRONG, WRONG, RIGHT], [RIGHT] * 4, [WRONG] * 4


# ---------------------------------------------------------------------------------------------------- dynamic sampling


def test_groups_that_teach_nothing_are_replaced_by_groups_of_further_draws(tmp_path):
    # Catches rows of one group under the prompt of another, a batch whose shape depends on luck, prompts drawn twice,
    # and noise shared by the draws.
    config = rl_config(tmp_path, **{"filter_groups.enable": True, "task.train_split": "train"})
    pen = Pen(config, [SAME, MIXED, NONE, MIXED], [MIXED, SAME, SAME, MIXED], [SAME] * 4)
    experience = collect(config, pen, cursor=8)
    source = prompt_source(build.rl_plan(config).data, "train", make_tokenizer(config.tokenizer))
    prompts = [example.prompt for example in source.batch(8, 8).examples]
    assert [seen[1] for seen in pen.seen] == [prompts[:4], prompts[4:]]
    keys = [jax.random.key_data(jax.random.fold_in(jax.random.key(0), draw)).tolist() for draw in (0, 1)]
    assert [seen[2] for seen in pen.seen] == keys  # the key itself is drawn with by none
    assert experience.next_cursor == 16 and experience.metrics["filter_groups/draws"] == 2
    kept = [prompts[1], prompts[3], prompts[4], prompts[7]]
    P = config.max_prompt_length
    for row, (tokens, length) in enumerate(
        zip(experience.batch.tokens_BT, experience.batch.prompt_lengths_B, strict=True)
    ):
        assert pen.tokenizer.decode(tokens[P - length : P].tolist()) == kept[row // 4]
    right = [
        pen.tokenizer.decode(tokens[:-1]) == kept[row // 4][-2]
        for row, tokens in enumerate(tokens_of(experience, config))
    ]
    assert right == [True, False, False, True] * 4
    kept_metrics = {name: value for name, value in experience.metrics.items() if name.startswith("kept_groups/")}
    assert kept_metrics["kept_groups/reward/mean"] == 0.5 and kept_metrics["kept_groups/frac_reward_zero_std"] == 0
    assert [sample["prompt"] for sample in experience.samples] == [kept[0]] * 2


def test_the_number_of_draws_is_bounded_and_the_batch_keeps_its_shape(tmp_path):
    # Catches a run that draws for ever on a task it has solved, one that trains on fewer rows than it was compiled for,
    # and draws that share their noise.
    config = rl_config(tmp_path, **{"filter_groups.enable": True, "filter_groups.max_num_gen_batches": 3})
    pen = Pen(config, [SAME, NONE, SAME, SAME], [SAME, SAME, MIXED, SAME], [SAME] * 4)
    experience = collect(config, pen)
    assert experience.metrics["filter_groups/draws"] == 3 and experience.next_cursor == 12
    assert len({tuple(key) for *_, key in pen.seen}) == 3
    assert experience.batch.tokens_BT.shape == (16, 4 + 6)
    kept_metrics = {name: value for name, value in experience.metrics.items() if name.startswith("kept_groups/")}
    assert kept_metrics["kept_groups/frac_reward_zero_std"] == 0.75
    assert kept_metrics["kept_groups/reward/mean"] == pytest.approx(10 / 16)


def test_metrics_report_all_that_was_drawn_and_the_kept_groups_under_their_own_names(tmp_path):
    # Catches the reward of groups chosen for being half right, given as that of the policy, and tokens/s that leave out
    # what was generated and thrown away.
    config = rl_config(tmp_path, **{"filter_groups.enable": True, "filter_groups.max_num_gen_batches": 3})
    draws = [[SAME, NONE, SAME, SAME], [SAME, SAME, MIXED, SAME], [NONE, NONE, NONE, NONE]]
    experience = collect(config, Pen(config, *draws))
    rewards = [c == RIGHT for draw in draws for group in draw for c in group]
    tokens = 48 * 2  # each completion is a character and the end token
    assert experience.metrics["reward/mean"] == pytest.approx(sum(rewards) / 48)
    assert experience.metrics["frac_reward_zero_std"] == pytest.approx(11 / 12)
    assert experience.metrics["num_tokens"] == tokens and experience.metrics["kept_groups/num_tokens"] == 16 * 2
    assert experience.metrics["kept_groups/reward/mean"] == pytest.approx(10 / 16)


def test_the_raw_reward_decides_which_groups_are_kept(tmp_path):
    # Catches a penalty on length that makes every group look mixed.
    config = rl_config(
        tmp_path, **{"filter_groups.enable": True, "filter_groups.max_num_gen_batches": 2, "overlong_buffer.len": 3}
    )
    long_and_short = ["=", "==", "====", "====="]  # all wrong, of different lengths
    pen = Pen(config, [long_and_short] * 4, [MIXED] * 4)
    experience = collect(config, pen)
    assert experience.metrics["filter_groups/draws"] == 2
    assert experience.metrics["kept_groups/reward/mean"] == 0.5 and experience.metrics["reward/mean"] == 0.25


def test_without_dynamic_sampling_one_draw_is_taken_as_it_is(tmp_path):
    # Catches filtering that nobody asked for.
    config = rl_config(tmp_path)
    experience = collect(config, Pen(config, [SAME, NONE, SAME, SAME]), cursor=4)
    assert experience.next_cursor == 8 and experience.metrics["frac_reward_zero_std"] == 1
    assert "filter_groups/draws" not in experience.metrics


# ---------------------------------------------------------------------------------------------------- shaping


def test_the_penalty_on_long_completions_counts_tokens(tmp_path):
    # Catches characters counted for tokens, the end token left out, and a raw reward that is logged shaped.
    config = rl_config(tmp_path, tokenizer="bytes", max_completion_length=10, scale_rewards="none", num_prompts=1)
    config.overlong_buffer.update(len=4, penalty_factor=0.5)
    texts = ["=====", "é" * 3, "é" * 4, "=" * 10]  # 6, 7, 9 and, cut off, 10 tokens
    experience = collect(config, Pen(config, [texts], truncated=texts[3:]))
    shaped = np.array([0, -1 / 4, -3 / 4, -1]) * 0.5
    np.testing.assert_allclose(experience.batch.inputs.advantages_BC[:, 0], shaped - shaped.mean(), atol=1e-6)
    assert (
        experience.metrics["reward/shaped_mean"] == pytest.approx(shaped.mean())
        and experience.metrics["reward/mean"] == 0
    )
    assert experience.metrics["completions/max_length"] == 10 and experience.metrics["num_tokens"] == 6 + 7 + 9 + 10
    assert experience.metrics["completions/clipped_ratio"] == 0.25


def test_a_penalty_on_the_distance_to_the_reference_is_summed_over_the_completion(tmp_path):
    # Catches a mean in place of the sum, columns past the end counted, and the sign.
    config = rl_config(tmp_path, reward_kl_coef=0.1, scale_rewards="none", num_prompts=1)
    texts = ["=", "==", "===", "===="]

    def scorer(params, tokens_BT, *_):
        assert params == "reference"
        return Scores(jnp.full((4, 6), -2.0), None)

    experience = collect(
        config, Pen(config, [texts]), state=TrainState(0, "params", None, ref_params="reference"), scorer=scorer
    )
    rewards = [-0.1 * sum(-row - (-2.0) for _ in range(len(text) + 1)) for row, text in enumerate(texts, 1)]
    want = np.array(rewards) - np.mean(rewards)
    np.testing.assert_allclose(experience.batch.inputs.advantages_BC[:, 0], want, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- comparison


def test_advantages_compare_with_the_group_and_are_zero_outside_of_the_completion(tmp_path):
    # Catches a comparison over the batch or across prompts, and advantages that leak into the padding.
    config = rl_config(tmp_path, num_prompts=2, updates_per_rollout=1)
    experience = collect(config, Pen(config, [[RIGHT, WRONG, WRONG, WRONG], MIXED]))
    rewards = np.array([[1, 0, 0, 0], [1, 0, 0, 1]], float)
    want_B = ((rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, ddof=1, keepdims=True) + 1e-6)).reshape(-1)
    want_BC = np.where(np.arange(6) < 2, want_B[:, None], 0)  # each is one character and the end token
    np.testing.assert_allclose(experience.batch.inputs.advantages_BC, want_BC, atol=1e-5)
    np.testing.assert_array_equal(experience.batch.inputs.mask_BC, np.arange(6) < np.full((8, 1), 2))


def test_rows_that_were_cut_off_leave_the_loss_where_the_config_says_so(tmp_path):
    # Catches a mask that also changes the comparison, and one that ignores the field.
    texts = [["=" * 6, RIGHT, WRONG, WRONG]]
    kept, masked = (
        collect(c, Pen(c, texts, truncated=("=" * 6,))).batch
        for c in (rl_config(tmp_path, num_prompts=1, mask_truncated_completions=flag) for flag in (False, True))
    )
    assert (
        kept.inputs.mask_BC[0].all() and not masked.inputs.mask_BC[0].any() and not masked.inputs.advantages_BC[0].any()
    )
    np.testing.assert_array_equal(masked.inputs.mask_BC[1:], kept.inputs.mask_BC[1:])
    np.testing.assert_array_equal(masked.inputs.advantages_BC[1:], kept.inputs.advantages_BC[1:])


def test_weights_by_sign_scale_the_advantages(tmp_path):
    # Catches weights given to the wrong sign.
    configs = [
        rl_config(tmp_path, num_prompts=1, advantage_weight_pos=positive, advantage_weight_neg=negative)
        for positive, negative in ((1.0, 1.0), (0.5, 2.0))
    ]
    plain, weighted = (
        np.asarray(collect(config, Pen(config, [MIXED])).batch.inputs.advantages_BC) for config in configs
    )
    np.testing.assert_allclose(weighted, np.where(plain > 0, 0.5, 2.0) * plain, rtol=1e-6)


def test_with_a_critic_returns_discount_by_gamma_and_trace_by_lam(tmp_path):
    # Catches gamma and lam swapped, either of them left at its default, values of other columns or rows, a critic whose
    # parameters are those of the policy.
    config = rl_config(
        tmp_path,
        num_prompts=1,
        **{"critic.enable": True, "critic.gamma": 0.9, "critic.lam": 0.5, "rewards": ("exact_match",)},
    )
    texts = [RIGHT, "=", "====", "=="]
    values_BC = np.random.default_rng(0).standard_normal((4, config.max_completion_length)).astype(np.float32)
    state = TrainState(jnp.int32(0), "policy", None, critic=TrainState(jnp.int32(0), "critic", None))
    value_fn = lambda params, tokens_BT, prompt_lengths_B: {"critic": jnp.asarray(values_BC)}[params]  # noqa: E731
    batch = collect(config, Pen(config, [texts]), state=state, value_fn=value_fn).batch
    mask_BC = np.arange(config.max_completion_length) < np.asarray(batch.completion_lengths_B)[:, None]
    rewards_BC = np.zeros(mask_BC.shape)
    rewards_BC[0, batch.completion_lengths_B[0] - 1] = 1.0
    advantages_BC = oracles.gae(rewards_BC, values_BC, mask_BC, gamma=0.9, lam=0.5)
    np.testing.assert_allclose(
        np.where(mask_BC, batch.returns_BC, 0), np.where(mask_BC, advantages_BC + values_BC, 0), atol=1e-5
    )
    np.testing.assert_array_equal(batch.old_values_BC, values_BC)


def test_several_rewards_are_weighted_and_reported_one_by_one(tmp_path):
    # Catches weights in the order of another list, and a metric of the weighted part.
    config = rl_config(
        tmp_path, num_prompts=1, rewards=("task", "format_hash"), reward_weights=(2.0, 0.5), tokenizer="chars:01=# "
    )
    experience = collect(config, Pen(config, [[RIGHT, "####1", WRONG, WRONG]]))
    assert experience.metrics["reward/mean"] == pytest.approx((2 + 0.5) / 4)
    assert experience.metrics["rewards/task"] == 0.25 and experience.metrics["rewards/format_hash"] == 0.25


# ---------------------------------------------------------------------------------------------------- which old policy


@pytest.mark.parametrize("mode", ["disabled", "R2", "R3"])
@pytest.mark.parametrize("whose", ["sampler", "learner"])
def test_old_log_probs_and_routes_are_those_that_the_config_names(tmp_path, whose, mode):
    # Catches R2 and R3 swapped, the learner's log-probs taken unasked, a pass over the model that nobody needs, and an
    # old policy under R3 that does not run the experts which the new one will run.
    config = rl_config(tmp_path, num_prompts=1, old_logps=whose, **{"router_replay.mode": mode})
    pen, calls = Pen(config, [MIXED]), []
    of_sampler, of_learner = jnp.zeros((1, 4, 10, 2), jnp.int8), jnp.ones((1, 4, 10, 2), jnp.int8)

    def scorer(params, tokens_BT, lengths_B, replayed_routes_LBTX=None):
        calls.append((params, replayed_routes_LBTX))
        return Scores(jnp.full((4, 6), -7.0), None, of_learner)

    batch = collect(config, lambda *args: pen(*args).replace(routes_LBTX=of_sampler), scorer=scorer).batch
    assert len(calls) == (whose == "learner" or mode == "R2")
    assert all(params == "params" and (routes is not None) == (mode == "R3") for params, routes in calls)
    assert bool((batch.inputs.old_logp_BC == -7).all()) == (whose == "learner")
    assert (batch.inputs.sampler_logp_BC is not None) == (whose == "learner")
    replayed = {"R2": of_learner, "R3": of_sampler}.get(mode)
    assert (batch.replayed_routes_LBTX is None) == (mode == "disabled")
    if replayed is not None:
        np.testing.assert_array_equal(batch.old_routes_LBTX, replayed)
        np.testing.assert_array_equal(batch.replayed_routes_LBTX, replayed)
        assert (
            all(routes is None for *_, routes in calls)
            if mode == "R2"
            else all(routes is of_sampler for *_, routes in calls)
        )


def test_a_sampler_that_lags_behind_draws_from_the_oldest_parameters(tmp_path):
    # Catches a lag of another length than was asked for, and one that reaches the learner's log-probs.
    config = rl_config(tmp_path, num_prompts=1, old_logps="learner", **{"mismatch.stale_rollouts": 2})
    pen, scored = Pen(config, [MIXED]), []

    def scorer(params, *_):
        scored.append(params)
        return Scores(jnp.zeros((4, 6)), None)

    collect(config, pen, state=TrainState(0, "now", None, stale_params=("oldest", "older")), scorer=scorer)
    assert pen.seen[0][0] == "oldest" and scored == ["now"]
