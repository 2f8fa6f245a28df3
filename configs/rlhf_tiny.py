"""The road from demonstrations to a policy that follows a learned reward, on running sums of 8 digits modulo 2, where
the truth is known: fine-tuning, preferences by a hidden judge, a reward model, then PPO, GRPO and GSPO against it.

Hidden   the share of right digits (`matching_characters`). It labels the pairs, is logged beside the model's reward,
         and is never trained on.
Arms     each method without a penalty on its distance to the start, and with one. Without: a weight of 1e-6, which
         does nothing but make the distance known.
weak     --config=configs/rlhf_tiny.py:weak has sums modulo 10 and fewer pairs, from which a model of this size learns
         little: what a policy finds in a reward that is often wrong.
Cost     about 9 minutes on 2 CPU cores for one seed (experiments/results/rlhf).
"""

from ml_collections import ConfigDict

from configs import base

DIGITS = {"num_digits": 8, "error_rate": 0.15}
MEASURED, HELD = 1e-6, 0.1  # weights of the distance


def on_digits(config: ConfigDict, weak: bool) -> ConfigDict:
    config.task.options = DIGITS | {"modulus": 10 if weak else 2}
    config.max_prompt_length, config.max_completion_length = 9, 12
    return config


def get_config(kind=""):
    if kind not in ("", "weak"):
        raise ValueError(f"no kind named {kind!r}; leave it out, or write weak")
    weak = kind == "weak"
    config = ConfigDict()
    config.seeds = (0,)
    config.workers = 0  # runs side by side; 0: one for each core of a CPU, one on an accelerator
    config.hidden = "matching_characters"

    config.sft = on_digits(base.sft(), weak)
    config.sft.num_updates = 250
    config.sft.optimizer.update(learning_rate=3e-3, schedule="cosine", warmup_steps=20)

    config.labels = on_digits(base.labels(), weak)
    config.labels.update(num_prompts=4096 if weak else 16_384, num_eval_prompts=1024)

    config.reward_model = on_digits(base.reward_model(), weak)
    config.reward_model.update(num_updates=300 if weak else 800, batch_size=64 if weak else 128)
    config.reward_model.eval.update(every=0, num_prompts=1024)
    config.reward_model.center_rewards_coefficient = 0.01
    config.reward_model.optimizer.update(learning_rate=1e-3, schedule="cosine", warmup_steps=20)

    config.rl = on_digits(base.rl(), weak)
    config.rl.update(num_rollouts=40, num_prompts=16, updates_per_rollout=4)
    config.rl.optimizer.learning_rate = 3e-4
    config.rl.eval.update(every=0, num_prompts=128)
    config.rl.checkpoint.update(every=20, keep_last=1, keep_best=False)
    config.rl.log.num_samples = 1

    def ppo(weight: float) -> dict:
        return {"objective": {"preset": "ppo"}, "critic": {"enable": True}, "reward_kl_coef": weight}

    def group(preset: str, weight: float, **ranges: float) -> dict:
        return {"objective": {"preset": preset, "beta": weight, **ranges}}

    config.arms = ConfigDict()
    for ending, weight in (("", MEASURED), (" + KL", HELD)):
        config.arms[f"PPO{ending}"] = ConfigDict(ppo(weight))
        config.arms[f"GRPO{ending}"] = ConfigDict(group("grpo", weight))
        config.arms[f"GSPO{ending}"] = ConfigDict(group("gspo", weight, epsilon=3e-3, epsilon_high=4e-3))
    return config
