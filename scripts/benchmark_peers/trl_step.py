"""One RL step with TRL's GRPOTrainer (GSPO settings) on PyTorch CPU. Runs in the environment of trl.txt.

Its own trainer, as a user has it: the phases are clocked around its methods.
"""

import os
import random
import tempfile
import time
import warnings

import work

OPTIONS = work.options(__doc__)
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(OPTIONS.threads)}
warnings.filterwarnings("ignore")

import datasets  # noqa: E402 - the environment is read on import
import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
from transformers.trainer_callback import PrinterCallback, ProgressCallback  # noqa: E402
from trl_words import make_tokenizer  # noqa: E402

CLOCK = work.Steps()


def make_model() -> transformers.PreTrainedModel:
    sizes = {
        "vocab_size": work.VOCAB, "hidden_size": work.WIDTH, "num_hidden_layers": work.LAYERS,
        "num_attention_heads": work.HEADS, "num_key_value_heads": work.KV_HEADS, "head_dim": work.HEAD_WIDTH,
        "intermediate_size": work.D_FF, "rope_theta": work.ROPE_THETA, "max_position_embeddings": 256,
        "tie_word_embeddings": False, "attention_dropout": 0.0, "dtype": "float32",
        "bos_token_id": None, "eos_token_id": work.END, "pad_token_id": work.PAD,
    }  # fmt: skip
    if OPTIONS.model == "moe":
        config = transformers.Qwen3MoeConfig(
            **sizes, num_experts=work.EXPERTS, num_experts_per_tok=work.EXPERTS_PER_TOKEN,
            moe_intermediate_size=work.D_EXPERT, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
            output_router_logits=False,
        )  # fmt: skip
        kind = transformers.Qwen3MoeForCausalLM
    else:
        config, kind = transformers.Qwen3Config(**sizes), transformers.Qwen3ForCausalLM
    config.pad_token_id = None  # the embedding has no row for it; nothing is ever padded
    model = kind(config).float()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = work.END, work.PAD
    return model


def reward(completion_ids, **_) -> list[float]:
    return [work.even_share(ids) for ids in completion_ids]


class Trainer(trl.GRPOTrainer):
    """TRL's, with clocks. The update is what is left of a step without generation and scoring."""

    scoring = False

    def _generate_single_turn(self, *args, **kwargs):
        start = time.perf_counter()
        done = super()._generate_single_turn(*args, **kwargs)
        CLOCK.add("rollout", start)
        return done

    def _generate_and_score_completions(self, *args, **kwargs):
        start, self.scoring = time.perf_counter(), True
        done = super()._generate_and_score_completions(*args, **kwargs)
        self.scoring = False
        CLOCK.now["update"] -= time.perf_counter() - start
        return done

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        start = time.perf_counter()
        done = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self.scoring:
            CLOCK.add("old_logps", start)
        return done


class Ends(transformers.TrainerCallback):
    """One RL step is UPDATES optimizer steps."""

    def on_train_begin(self, *_, **__):
        CLOCK.begin()

    def on_step_end(self, args, state, control, **_):
        if state.global_step % work.UPDATES == 0:
            CLOCK.now["update"] += time.perf_counter() - CLOCK.began
            CLOCK.end()


def main() -> None:
    torch.set_num_threads(OPTIONS.threads)
    torch.manual_seed(0)
    random.seed(0)
    transformers.logging.set_verbosity_error()
    rows = datasets.Dataset.from_dict({"prompt": [" ".join(f"t{i}" for i in ids) for ids in work.prompts()]})
    tokenizer = make_tokenizer(work.VOCAB, work.END, work.PAD)
    config = trl.GRPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=work.MINIBATCH, num_generations=work.GROUP,
        gradient_accumulation_steps=1, steps_per_generation=work.UPDATES, num_iterations=1,
        max_completion_length=work.COMPLETION, temperature=1.0, top_k=0, top_p=1.0,
        importance_sampling_level="sequence", loss_type="grpo", beta=0.0, epsilon=work.EPSILON,
        epsilon_high=work.EPSILON_HIGH, learning_rate=work.LEARNING_RATE, lr_scheduler_type="constant",
        optim="adamw_torch", max_grad_norm=1.0, max_steps=(OPTIONS.warmup + OPTIONS.steps) * work.UPDATES,
        gradient_checkpointing=False, bf16=False, fp16=False, use_cpu=True, use_vllm=False, logging_strategy="no",
        save_strategy="no", report_to="none", disable_tqdm=True, shuffle_dataset=False, dataloader_num_workers=0,
        seed=0, **({"router_aux_loss_coef": 0.0} if OPTIONS.model == "moe" else {}),
    )  # fmt: skip
    trainer = Trainer(
        model=make_model(), reward_funcs=reward, args=config, train_dataset=rows, processing_class=tokenizer,
        callbacks=[Ends()],
    )  # fmt: skip
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.train()
    versions = {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    CLOCK.write(OPTIONS.json, OPTIONS.warmup, versions=versions)


if __name__ == "__main__":
    main()
