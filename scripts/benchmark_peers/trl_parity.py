"""TRL's side of parity.py: its GRPOTrainer on completions and rewards that it is given, parameters saved after each
optimizer step. Runs in the environment of trl.txt.

    python scripts/benchmark_peers/trl_parity.py FOLDER

FOLDER holds what parity.py has written: work.json, and in model/ the weights. What of TRL is replaced: the generation
(its completions are given), and the shuffling of rows before they are cut into minibatches (off, so that both sides
have the same minibatches). All else is its own.
"""

import json
import os
import sys
import warnings
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"CUDA_VISIBLE_DEVICES": ""}
warnings.filterwarnings("ignore")

import datasets  # noqa: E402 - the environment is read on import
import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
from trl.trainer import grpo_trainer  # noqa: E402
from trl_words import make_tokenizer  # noqa: E402

FOLDER = Path(sys.argv[1])
WORK = json.loads((FOLDER / "work.json").read_text())
grpo_trainer.shuffle_sequence_dict = lambda rows: rows
LOSSES: list[dict[str, float]] = []


class Trainer(trl.GRPOTrainer):
    def _generate_single_turn(self, prompt_ids, *_, **__):
        wanted = [ids for ids in WORK["prompts"] for _ in range(WORK["num_generations"])]
        assert [list(ids) for ids in prompt_ids] == wanted, "TRL's rows are not in the order of the prompts"
        return WORK["completions"], None


def reward(completion_ids, **_) -> list[float]:
    assert [list(ids) for ids in completion_ids] == WORK["completions"]
    return WORK["rewards"]


class Saves(transformers.TrainerCallback):
    def on_log(self, args, state, control, logs, **_):
        if "loss" in logs:  # of a step
            LOSSES.append({name: value for name, value in logs.items() if isinstance(value, int | float)})

    def on_step_end(self, args, state, control, model, **_):
        model.save_pretrained(FOLDER / f"trl-{state.global_step}")  # by the names of checkpoints, experts one by one


def main() -> None:
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER / "model", dtype=torch.float32)
    size = WORK["vocab_size"]
    tokenizer = make_tokenizer(size - 2, end=size - 2, pad=size - 1)  # both in no text
    rows = datasets.Dataset.from_dict({"prompt": [" ".join(f"t{i}" for i in ids) for ids in WORK["prompts"]]})
    recipe = {  # the GSPO example of TRL's documentation; all else is default, but for how it runs and what it logs
        "importance_sampling_level": "sequence", "loss_type": "grpo", "beta": 0.0, "epsilon": 3e-4,
        "epsilon_high": 4e-4, "gradient_accumulation_steps": 1, "steps_per_generation": 4,
    }  # fmt: skip
    if WORK["moe"]:
        recipe["router_aux_loss_coef"] = 0.0
    config = trl.GRPOConfig(
        output_dir=str(FOLDER / "out"), learning_rate=WORK["learning_rate"], max_steps=WORK["max_steps"],
        max_completion_length=WORK["max_completion_length"], optim="adamw_torch", shuffle_dataset=False, bf16=False,
        gradient_checkpointing=False, use_cpu=True, report_to="none", save_strategy="no", logging_steps=1,
        disable_tqdm=True, **recipe,
    )  # fmt: skip
    trainer = Trainer(
        model=model, reward_funcs=reward, args=config, train_dataset=rows, processing_class=tokenizer,
        callbacks=[Saves(), Stops()],
    )  # fmt: skip
    trainer.train()
    versions = {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    (FOLDER / "trl.json").write_text(json.dumps({"versions": versions, "logs": LOSSES}))


class Stops(transformers.TrainerCallback):
    """After one rollout: the schedule goes on, so that its learning rates are those of a run."""

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == 4


if __name__ == "__main__":
    main()
