"""TRL's GSPO recipe, field by field: trl.GRPOConfig with the values of its documentation's GSPO example, all else at
TRL 1.16's defaults. Each line names TRL's field where it has another name; what is as in configs/base.py is not said.

Start    --config.init_from=runs/NAME, which scripts/import_hf.py wrote: model and tokenizer come from it.
Data     GSM8K (TRL's example names no data); --config.task.name=jsonl:... or dataset:... for your own.
Rollout  4 prompts x 8 completions; 4 updates each: TRL on one device.
Cost     that of the model: 500 rollouts of 32 completions of up to 512 tokens.
"""

from configs import base


def get_config():
    config = base.rl()
    config.task.name = "tfds:gsm8k"
    config.task.options = {"answer_format": "free", "data_dir": ""}
    config.overlong_prompts = "drop"
    config.max_prompt_length = 512  # TRL 1.x has no limit; here a prompt has a frame
    # The GSPO example.
    config.objective.preset = "grpo"  # loss_type="grpo": a mean over the tokens of a sequence, then over sequences
    config.objective.importance_sampling_level = "sequence"
    config.objective.beta = 0.0
    config.objective.epsilon = 3e-4
    config.objective.epsilon_high = 4e-4
    config.micro_batch_size = 0  # gradient_accumulation_steps=1: 0 is a whole minibatch at a time
    config.updates_per_rollout = 4  # steps_per_generation=4 with gradient_accumulation_steps=1
    # TRL's defaults.
    config.num_iterations = 1
    config.num_generations = 8
    config.num_prompts = 4  # per_device_train_batch_size=8 x steps_per_generation=4, over num_generations
    config.max_completion_length = 512
    config.temperature, config.top_p, config.top_k, config.min_p = 1.0, 1.0, 0, 0.0  # min_p=None
    config.scale_rewards = "group"
    config.mask_truncated_completions = False
    config.reward_weights = ()  # None
    config.sync_ref_model = False
    config.old_logps = "learner"  # TRL scores each rollout once with the model in training, whatever sampled it
    config.optimizer.learning_rate = 1e-6
    config.optimizer.schedule = "linear"  # lr_scheduler_type
    config.optimizer.warmup_steps = 0
    config.optimizer.beta1, config.optimizer.beta2, config.optimizer.eps = 0.9, 0.999, 1e-8  # adam_*
    config.optimizer.weight_decay = 0.0
    config.optimizer.max_grad_norm = 1.0
    config.num_rollouts = 500  # max_steps=2000, over steps_per_generation
    config.seed = 42
    # Ours: TRL evaluates and saves by its own schedule.
    config.eval.update(every=50, num_prompts=128, num_generations_eval=8)
    config.checkpoint.every = 50
    return config
