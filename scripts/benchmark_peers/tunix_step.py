"""One RL step with Google's Tunix (GRPOLearner, gspo-token) on a CPU. Runs in the environment of tunix.txt.

Its own loop draws anew for each minibatch and computes no old log-probs. Here its parts are put together so that the
work is the same: RLCluster.generate on all rows, rewards, advantages and old log-probs by GRPOLearner, then
RLCluster.update_actor on the minibatches.
"""

import os
import time
import warnings

import work

OPTIONS = work.options(__doc__)
os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
warnings.filterwarnings("ignore")

import importlib.metadata  # noqa: E402 - the environment is read on import

import jax  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from flax import nnx  # noqa: E402
from jax.sharding import Mesh  # noqa: E402
from tunix.models.qwen3 import model as qwen3  # noqa: E402
from tunix.rl import rl_cluster  # noqa: E402
from tunix.rl import utils as rl_utils  # noqa: E402
from tunix.rl.grpo import grpo_learner  # noqa: E402
from tunix.rl.rollout import base_rollout  # noqa: E402

CLOCK = work.Steps()


class Numbers:
    """Its tokenizer: "t17 t4" is [17, 4]."""

    def encode(self, text, **_):
        return [int(word[1:]) for word in text.split()]

    def decode(self, ids, **_):
        return " ".join(f"t{int(i)}" for i in ids)

    def bos_id(self):
        return None

    def eos_id(self):
        return work.END

    def pad_id(self):
        return work.PAD


def reward(prompts, completions, **_) -> list[float]:
    return [work.even_share(Numbers().encode(completion)) for completion in completions]


def make_model(mesh: Mesh) -> nnx.Module:
    moe = OPTIONS.model == "moe"
    config = qwen3.ModelConfig(
        num_layers=work.LAYERS, vocab_size=work.VOCAB, embed_dim=work.WIDTH, num_heads=work.HEADS,
        hidden_dim=work.D_EXPERT if moe else work.D_FF, head_dim=work.HEAD_WIDTH, num_kv_heads=work.KV_HEADS,
        norm_eps=1e-6, rope_theta=work.ROPE_THETA, use_tied_embedding=False,
        num_experts=work.EXPERTS if moe else None, num_experts_per_tok=work.EXPERTS_PER_TOKEN if moe else None,
    )  # fmt: skip
    with mesh:
        model = qwen3.Qwen3(config, rngs=nnx.Rngs(0))
    # It begins dense layers at zero: every matrix gets N(0, 0.02) as in transformers.
    leaves, tree = jax.tree.flatten(nnx.state(model, nnx.Param))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    drawn = [
        0.02 * jax.random.normal(key, x.shape, x.dtype) if x.ndim > 1 else x
        for key, x in zip(keys, leaves, strict=True)
    ]
    nnx.update(model, jax.tree.unflatten(tree, drawn))
    return model


def make_learner(steps: int) -> grpo_learner.GRPOLearner:
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    role = rl_cluster.Role
    prompts_of_minibatch = work.PROMPTS // work.UPDATES
    cluster = rl_cluster.RLCluster(
        actor=make_model(mesh),
        reference=None,
        tokenizer=Numbers(),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh={role.ACTOR: mesh, role.REFERENCE: mesh, role.ROLLOUT: mesh},
            rollout_engine="vanilla",
            offload_to_cpu=False,
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optax.chain(
                    optax.clip_by_global_norm(1.0), optax.adamw(work.LEARNING_RATE, weight_decay=0.0)
                ),
                eval_every_n_steps=10**9,
                max_steps=steps * work.UPDATES,
                mini_batch_size=prompts_of_minibatch,
                train_micro_batch_size=prompts_of_minibatch,
                rollout_micro_batch_size=work.PROMPTS,
                compute_logps_micro_batch_size=work.PROMPTS,
            ),
            rollout_config=base_rollout.RolloutConfig(
                max_tokens_to_generate=work.COMPLETION, max_prompt_length=work.PROMPT,
                kv_cache_size=work.PROMPT + work.COMPLETION,  # its default of 1024 would be slower
                temperature=1.0, top_p=1.0, top_k=None,
            ),
        ),
    )  # fmt: skip
    config = grpo_learner.GRPOConfig(
        loss_algo="gspo-token", num_generations=work.GROUP, beta=0.0, epsilon=work.EPSILON,
        num_iterations=2,  # with 1 it computes no old log-probs
        loss_agg_mode="sequence-mean-token-mean",
    )  # fmt: skip
    learner = grpo_learner.GRPOLearner(rl_cluster=cluster, algo_config=config, reward_fns=reward)
    learner._rollout_micro_batch_size = learner._compute_logps_micro_batch_size = work.PROMPTS  # as its train() would
    return learner


def clocked(owner, method: str, phase: str, wait) -> None:
    """Puts a clock around a method; wait(result) is waited for."""
    inner = getattr(owner, method)

    def outer(*args, **kwargs):
        start = time.perf_counter()
        done = inner(*args, **kwargs)
        jax.block_until_ready(wait(done))
        CLOCK.add(phase, start)
        return done

    setattr(owner, method, outer)


def main() -> None:
    steps = OPTIONS.warmup + OPTIONS.steps
    learner = make_learner(steps)
    cluster = learner.rl_cluster
    clocked(cluster, "generate", "rollout", lambda done: ())
    clocked(cluster, "get_old_per_token_logps", "old_logps", lambda done: done)
    clocked(
        cluster, "update_actor", "update",
        lambda done: jax.tree.leaves(nnx.state(cluster.actor_trainer.model, nnx.Param)),
    )  # fmt: skip
    prompts = [" ".join(f"t{i}" for i in ids) for ids in work.prompts() for _ in range(work.GROUP)]
    CLOCK.begin()
    for _ in range(steps):
        rows = learner._generate_and_compute_advantage({"prompts": prompts})
        cuts = [slice(i * work.MINIBATCH, (i + 1) * work.MINIBATCH) for i in range(work.UPDATES)]
        cluster.update_actor([rl_utils.get_batch_slice(rows, cut) for cut in cuts], None, False)
        if learner.should_sync_weights:  # as its train() does
            cluster.sync_weights()
        else:
            cluster.global_steps += 1
        CLOCK.end()
    versions = {name: importlib.metadata.version(name) for name in ("google-tunix", "jax", "flax")}
    CLOCK.write(OPTIONS.json, OPTIONS.warmup, versions=versions)


if __name__ == "__main__":
    main()
