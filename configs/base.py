"""Every field of a run, with its default. Experiment configs start from here and change a few.

A field that is None takes its value from somewhere better: an objective's from its preset, a default that depends on
another field."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

# Fields of `common` that training on preferences has not: nothing is sampled there, nothing judged.
OF_TRAINING = (  # and what labelling has not: nothing is trained there
    "optimizer", "lora", "micro_batch_size", "logp_chunk", "router_aux_loss_coef", "router_z_loss_coef", "eval",
    "checkpoint", "log",
)  # fmt: skip
OF_SAMPLING = ("stop_strings", "prompt_buckets", "reward_workers", "reward_timeout_s", "rewards_max_errors")


def model() -> ConfigDict:
    """A model. None: as the weights of init_from have it, else as the toy Mixture of Experts has (in brackets): 4
    layers, 8 experts of which 2 run, about 450k parameters."""
    return ConfigDict(
        dict(
            vocab_size=placeholder(int),  # 0: the tokenizer's; imported models may have rows that no token uses
            num_layers=placeholder(int),  # [4]
            d_model=placeholder(int),  # [64]
            num_heads=placeholder(int),  # [4]
            num_kv_heads=placeholder(int),  # [2]
            head_width=placeholder(int),  # [16]
            d_ff=placeholder(int),  # width of dense feed-forward layers; used where num_experts = 0, or dense_layers
            num_experts=placeholder(int),  # [8]
            experts_per_token=placeholder(int),  # [2]
            d_expert=placeholder(int),  # [64]
            norm_topk_prob=placeholder(bool),  # [True]
            dense_layers=placeholder(tuple),  # [()] layers, from 0 on, that have no experts but a feed-forward of d_ff
            router=placeholder(str),  # [softmax] | sigmoid, with a bias for the choice, as in DeepSeek-V3
            routed_scale=placeholder(float),  # [1.0] factor on the gates of routed experts
            d_shared=placeholder(
                int
            ),  # [0] width of an expert that all tokens go through beside the routed ones; 0: none
            shared_gate=placeholder(bool),  # [False] it is weighed by a gate of its own, as in Qwen2-MoE
            rope_theta=placeholder(float),  # [1e4]
            rotary_width=placeholder(int),  # [0] how many numbers of each head are rotated; 0: all
            # ("yarn", factor, trained length), ("linear", factor), Llama 3.1's (factor, low, high, trained length), or
            # () for none (gspo/model/rope.py)
            rope_scaling=placeholder(tuple),
            rms_eps=placeholder(float),  # [1e-6]
            qk_norm=placeholder(bool),  # [True]
            qk_norm_over=placeholder(str),  # [head] | projection
            qkv_bias=placeholder(bool),  # [False] of queries, keys and values, as Qwen2 has it
            out_bias=placeholder(bool),  # [False] of the output of attention
            tie_embeddings=placeholder(bool),  # [False]
            # How it runs: free to choose, whatever the weights.
            dtype="float32",  # of the matmuls; router, softmax, log-probs and parameters are float32 always
            moe_backend="auto",  # auto | dense | blocked | looped | ragged | tokamax (gspo/model/experts.py)
            remat=False,
            scan_layers=placeholder(bool),  # layers as a loop: compiles faster, runs slower; None: from 9 layers on
            attention_chunk=0,  # query columns whose attention scores exist at a time; 0: all
        )
    )


def optimizer() -> ConfigDict:
    return ConfigDict(
        dict(
            learning_rate=1e-3,
            schedule="constant",  # constant | linear | cosine
            warmup_steps=0,  # in optimizer updates
            beta1=0.9,
            beta2=0.95,
            eps=1e-8,
            weight_decay=0.0,
            max_grad_norm=1.0,
            lr_scale="",  # "router=20": learning rate of parameters of that name, a pattern, over the rest; 0: frozen
        )
    )


def lora() -> ConfigDict:
    """Low-rank adapters, trained in place of the weights (gspo/model/adapters.py)."""
    return ConfigDict(
        dict(
            rank=0,  # 0: the weights are trained
            alpha=32.0,  # W + alpha / rank A B
            # Patterns of names of matrices, "attention/(query|value)" say; routers only by one that finds nothing else.
            targets="attention/, (mlp|moe)/",
        )
    )


def common() -> ConfigDict:
    """What all kinds of training share."""
    config = ConfigDict()
    config.seed = 0
    config.init_from = ""  # a workdir or checkpoint folder whose parameters to start from
    config.task = ConfigDict(
        dict(
            # running_sum | arithmetic | reasoning_gym:NAME | tfds:gsm8k | jsonl:PATH | dataset:PATH
            name="running_sum",
            system_prompt="",  # what conversations begin with, for tokenizers with a chat template
            train_split="train",
            eval_split="test",
            options=ConfigDict(dict(num_digits=12, modulus=10, error_rate=0.12)),
        )
    )
    # bytes | chars:ALPHABET | path of a tokenizer.json or its folder. None: that of init_from, else the toy's.
    config.tokenizer = placeholder(str)
    config.max_prompt_length = 13  # tokens
    config.max_completion_length = 16  # tokens, the end-of-sequence token included
    config.stop_strings = ()  # texts that end a completion besides eos tokens, with the token that completes them
    config.overlong_prompts = "error"  # error | drop
    config.prompt_buckets = ()  # shorter prompt frames, used where all prompts of a rollout fit; one compilation each
    config.model = model()
    config.lora = lora()
    config.optimizer = optimizer()
    config.micro_batch_size = 0  # rows per forward and backward pass; 0: the whole minibatch
    config.logp_chunk = 128  # completion columns whose logits exist at a time
    config.router_aux_loss_coef = 0.0  # load-balance loss of the routers on completion tokens
    config.router_z_loss_coef = 0.0
    config.mesh = ConfigDict(dict(data=-1, fsdp=1, expert=1, tensor=1))  # devices along each axis; -1: the rest
    config.mesh_rules = (
        "tensor"  # what is cut along which axis: single | fsdp | expert | expert_fsdp | tensor (gspo/parallel/sharding)
    )
    config.rollout_mesh_rules = (
        ""  # another one for rollouts, to which parameters are moved once per rollout; "": the same
    )
    config.expert_dispatch = "all_gather"  # all_gather | all_to_all: how tokens come to experts on other devices
    config.rollout_expert_dispatch = ""  # the same for rollouts; "": the same
    config.eval = ConfigDict(
        dict(
            every=5,  # rollouts (RL) or updates (SFT) between evaluations; 0: only at the end
            num_prompts=128,
            num_generations_eval=8,
            temperature=1.0,
            top_k=0,  # 0: all tokens
            top_p=1.0,
            # By which completions are judged, one as in `rewards` that reads texts (reward_model:WORKDIR does not);
            # solved where it is 1. "": the task's own.
            reward="",
        )
    )
    config.reward_workers = 0  # processes for rewards "module:function" and math_verify; 0: in this one, without limit
    config.reward_timeout_s = 10.0  # of one call there; who takes longer is ended, and its completions count as failed
    config.rewards_max_errors = 0.1  # share of a rollout's completions on which a reward may fail: they count as 0
    config.checkpoint = ConfigDict(dict(every=5, keep_last=2, keep_best=True))
    # wandb_name "": the name of the workdir
    config.log = ConfigDict(dict(num_samples=2, tensorboard=False, wandb=False, wandb_project="gspo", wandb_name=""))
    return config


def sft() -> ConfigDict:
    """Supervised fine-tuning on demonstrations."""
    config = common()
    config.num_updates = 300
    config.batch_size = 128  # demonstrations per update, one to a row
    config.packing = False  # True: several demonstrations to a row, each seeing itself alone; batch_size counts rows
    config.target_pass_at_1 = placeholder(float)  # ends at the first evaluation that reaches it; None: never
    config.eval.every = 0
    config.checkpoint.every = 100
    return config


def pairs() -> ConfigDict:
    """What training on preferences shares. task.name: jsonl:PATH | tfds:NAME, of prompt, chosen, rejected and, where
    there is one, margin (gspo/data/preferences.py); running_sum is the toy."""
    config = common()
    for field in OF_SAMPLING:
        del config[field]
    config.num_updates = 300
    config.batch_size = 64  # pairs per update, two rows each
    config.eval = ConfigDict(dict(every=50, num_prompts=512))  # updates between evaluations; held-out pairs
    config.checkpoint.every = 100
    return config


def reward_model() -> ConfigDict:
    """A reward model."""
    config = pairs()
    config.center_rewards_coefficient = 0.0  # weight of the term that keeps scores around zero; 0.01 is usual
    return config


def dpo() -> ConfigDict:
    """Direct preference optimization of the policy in init_from, which is also the reference."""
    config = pairs()
    config.optimizer.learning_rate = 1e-4
    config.beta = 0.1  # how much the policy is held to the reference
    config.label_smoothing = 0.0  # rate at which labels are taken to be exchanged
    return config


def labels() -> ConfigDict:
    """Preferences that a judge gives, over two completions of each prompt by the policy in init_from."""
    config = common()
    for field in OF_TRAINING:
        del config[field]
    config.num_prompts = 2048  # of the training split, two completions each
    config.num_eval_prompts = 512  # of the evaluation split
    config.prompts_at_a_time = 128
    config.temperature = 1.0
    config.top_k = 0
    config.top_p = 1.0
    config.min_p = 0.0
    # One as in `rewards` of rl() that reads texts (reward_model:WORKDIR does not); or model:FOLDER, a language model
    # that is asked to compare the two.
    config.judge = "task"
    config.judge_template = ""  # its question, with {prompt}, {first}, {second}; "": that of gspo/judge.py
    config.label_temperature = 0.0  # labels are drawn with sigmoid(difference / temperature); 0: the better is chosen
    return config


def rl() -> ConfigDict:
    """Reinforcement learning from verifiable rewards."""
    config = common()
    config.num_rollouts = 20
    config.num_prompts = 32  # prompts per rollout
    config.num_generations = 8  # completions per prompt
    config.updates_per_rollout = 4  # minibatches, one optimizer update each, all against the same old policy
    config.num_iterations = (
        1  # passes over a rollout, of updates_per_rollout updates each; rows are shuffled in between
    )
    config.share_prompts = True  # a group's prompt runs once in the learner; False: with each of its completions
    config.temperature = 1.0
    config.top_k = 0
    config.top_p = 1.0
    config.min_p = 0.0
    config.max_num_seqs = 0  # rows decoded at a time: one that has ended makes room for a waiting one; 0: all at once
    config.old_logps = "sampler"  # sampler | learner: whose log-probs of the rollout are the old policy's
    config.objective = (
        ConfigDict(  # None: as the preset has it, else the default; all are explained in gspo/objectives/presets.py
            dict(
                preset="gspo",
                importance_sampling_level=placeholder(str),  # token | sequence | sequence_token | sequence_sum
                surrogate=placeholder(str),  # clip | dual_clip | cispo | gmpo | sapo | minirl | reinforce
                epsilon=placeholder(float),
                epsilon_high=placeholder(float),
                delta=placeholder(float),
                temperature_pos=placeholder(float),
                temperature_neg=placeholder(float),
                cap=placeholder(float),
                loss_agg_mode=placeholder(str),
                loss_norm_length=placeholder(int),
                beta=placeholder(float),  # weight of the KL term; 0: no reference tree is held
                kl_loss_type=placeholder(str),  # k1 | k2 | k3
                kl_importance=placeholder(str),  # none | stopped | differentiable
                entropy_coef=placeholder(float),
                sampler_is=placeholder(
                    str
                ),  # tis | mis | icepop | seq_tis | seq_mis | geo_rs; needs old_logps = "learner"
                sampler_is_low=placeholder(float),
                sampler_is_high=placeholder(float),
                off_policy_mask_threshold=placeholder(float),
                router_shift_floor=placeholder(float),
            )
        )
    )
    config.entropy_target = placeholder(
        float
    )  # nats per token; the bonus then adapts, starting at objective.entropy_coef
    config.entropy_step = 1e-3  # change of the coefficient per update
    config.sync_ref_model = False
    config.ref_model_sync_steps = 10  # rollouts
    config.ref_model_mixup_alpha = 0.6
    config.ref_dtype = "float32"  # float32 | bfloat16: how the reference is kept; it computes as the policy does
    config.ref_offload = False  # whether it lies in the host's memory between uses
    # group | batch | none | rloo | reinforce++ | reinforce++_baseline: how completions are compared, without a critic
    config.scale_rewards = "group"
    config.critic = ConfigDict(  # PPO: advantages from a value model by GAE instead of from the group
        dict(
            enable=False,
            # "policy": the body begins with the policy's first weights; "": with random ones; or the workdir of a
            # policy, or of a reward model, which may be smaller than the policy and must have its tokenizer
            init_from="policy",
            warmup_rollouts=0,  # the first so many rollouts update the critic alone
            learning_rate=1e-3,
            warmup_steps=placeholder(int),  # of its learning rate; None: as in `optimizer`, as all that is not here
            weight_decay=placeholder(float),
            max_grad_norm=placeholder(float),
            cliprange_value=0.5,
            gamma=1.0,
            lam=0.95,
        )
    )
    config.advantage_weight_pos = 1.0
    config.advantage_weight_neg = 1.0
    # "task" is the task's own; others from gspo.data.rewards; "math_verify"; "module:function" of the working
    # directory; "reward_model:WORKDIR" is one that was trained
    config.rewards = ("task",)
    config.reward_weights = ()  # one for each; (): 1 each
    config.reward_model = ConfigDict(  # of all that are named
        dict(
            normalize=True,  # scores are (score - mean) / std of their training data
            clip=0.0,  # the largest |score| after that; 0: no limit
            dtype="float32",  # float32 | bfloat16: how weights are kept
            offload=False,  # whether they lie in the host's memory between uses
        )
    )
    config.reward_kl_coef = 0.0  # penalty on log π_old/π_ref, summed over a completion
    config.overlong_buffer = ConfigDict(
        dict(len=0, penalty_factor=1.0)
    )  # tokens before the limit in which a penalty grows
    config.mask_truncated_completions = False
    config.filter_groups = ConfigDict(dict(enable=False, max_num_gen_batches=4))  # dynamic sampling
    config.router_replay = ConfigDict(dict(mode="disabled"))  # disabled | R2 | R3
    config.mismatch = (
        ConfigDict(  # a sampler that differs from the learner on purpose; gspo/learning/mismatch.py explains
            dict(params="float32", router_noise=0.0, expert_swap=0.0, stale_rollouts=0)
        )
    )
    config.log.update(samples_every=5, router_kl=False)  # rollouts between samples; whether the routers' KL is measured
    # Rollouts between two whose tokens are recorded, for scripts/view.py; 0: never. Such a rollout takes two forward
    # passes more, at the size of configs/quickstart.py two thirds of its time: 25 costs 3%.
    config.log.tokens_every = 0
    config.profile_rollouts = ()  # rollouts of which jax.profiler writes a trace into <workdir>/profile
    # Largest |log-ratio| allowed before the first update, but for one token in a thousand; None: by the dtype. inf:
    # any at all, so that log-probs of a sampler with an injected mismatch may be the old policy's (GSPO §5.4).
    config.check_tolerance = placeholder(float)
    return config
