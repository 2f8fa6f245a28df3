"""Makes a checkpoint of a Hugging Face folder, to start runs from.

    python scripts/import_hf.py --model-dir=models/Qwen3-0.6B --out=runs/qwen3-0.6b

The folder holds config.json and safetensors; Qwen3, Qwen3-MoE, Mixtral, Llama and OLMoE are known. A sequence
classifier of one label (LlamaForSequenceClassification, ...) becomes a reward model. Writes under --out:

    checkpoints/0/   the parameters, for config.init_from
    tokenizer/       the tokenizer's files: --config.init_from alone starts a run from model and tokenizer
    hf/              config.json and the files that scripts/export_hf.py takes over
    model.json       the fields of config.model

and prints the flag that starts a run from it. --mesh=fsdp=8 (axes data, fsdp, expert, tensor; -1: the rest) reads the
weights straight into their shardings over several devices.
"""

import argparse
import dataclasses
import json
import shutil
from pathlib import Path

import jax

from gspo.data.tokenizer import make_tokenizer, save_files
from gspo.hf import folder as hf
from gspo.hf.classifier import import_reward_model, is_classifier
from gspo.hf.families import family_of, read_config, spec_from_hf
from gspo.learning.critic import Critic
from gspo.model.transformer import Transformer, abstract_params
from gspo.parallel.sharding import Layout, make_mesh, parse_sizes
from gspo.run import cli
from gspo.run.checkpoint import Checkpointer
from gspo.run.identity import POLICY, REWARD_MODEL, TOKENIZER, identity
from gspo.types import UserError


def parse(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model-dir", required=True, help="folder with config.json and safetensors")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--mesh", default="", help="devices along mesh axes, as in fsdp=8; default: the first device")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse(argv)
    folder, out = Path(args.model_dir), Path(args.out)
    if not folder.is_dir():
        raise UserError(f"--model-dir={folder}: there is no such folder")
    if (out / "checkpoints").exists():
        raise UserError(f"--out={out} already holds checkpoints: choose another folder")
    config = read_config(folder)
    spec, layout, kind = spec_from_hf(config), Layout(make_mesh(parse_sizes(args.mesh))), POLICY
    if is_classifier(config):
        kind = REWARD_MODEL
        params = import_reward_model(folder, spec, abstract_params(Critic(spec, layout), layout))
    else:
        params = hf.import_params(folder, spec, abstract_params(Transformer(spec), layout))
    try:
        (out / "hf").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / "config.json", out / "hf" / "config.json")
        carried = hf.carry_over(folder, out / "hf")
        (out / "model.json").write_text(json.dumps(dataclasses.asdict(spec), indent=2) + "\n")
        tokenizer = make_tokenizer(str(out / "hf")) if "tokenizer.json" in carried else None
        if tokenizer:
            save_files(tokenizer, out / TOKENIZER)
        own = identity(spec, tokenizer, kind)
        with Checkpointer(out, keep_last=1, async_save=False, identity=own) as checkpointer:
            checkpointer.save(0, {"params": params}, {"imported_from": str(folder)})
    except OSError as error:
        raise UserError(f"--out={out} cannot be written: {error.strerror}") from None
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{out}: {family_of(spec)}, {spec.num_layers} layers, {count:,} parameters")
    if kind == REWARD_MODEL:
        print(f"a reward model: --config.rewards=\"('reward_model:{out}',)\" --config.reward_model.normalize=False")
        return 0
    print(f"start from it with: --config.init_from={out}" + ("" if tokenizer else " --config.tokenizer=..."))
    return 0


if __name__ == "__main__":
    cli.run_script(main)
