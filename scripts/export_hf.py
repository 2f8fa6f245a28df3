"""Writes the parameters of a run as a Hugging Face folder, which `transformers`, vLLM and scripts/import_hf.py load.

    python scripts/export_hf.py --checkpoint=runs/gspo --out=exports/gspo --dtype=bfloat16

A reward model becomes a sequence classifier of one label (Qwen3ForSequenceClassification, ...).

--checkpoint is a workdir (its latest checkpoint is taken; runs/gspo@best and runs/gspo@120 choose another), or the
folder of one step in it, or what scripts/import_hf.py wrote. The model is described by the config.json or model.json
beside it. The tokenizer's files, and the keys of config.json that are no matter of ours, are taken over from
--tokenizer-dir; default: the folder of the run's tokenizer, where it has one.

The adapters of a run with config.lora are merged into its weights; --adapter writes them alone, in PEFT's format, for
the model under them, which is --checkpoint=runs/gspo/base.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

from gspo.data.tokenizer import make_tokenizer
from gspo.hf import folder as hf
from gspo.hf.classifier import export_reward_model
from gspo.hf.families import family_of
from gspo.hf.peft import export_adapters
from gspo.learning.critic import Critic
from gspo.model.spec import ModelSpec
from gspo.model.transformer import Transformer, abstract_params
from gspo.parallel.sharding import Layout, make_mesh, parse_sizes
from gspo.run import cli
from gspo.run.checkpoint import restore_adapters, restore_params
from gspo.run.identity import REWARD_MODEL, TOKENIZER, kind_of, run_folder, saved_identity, spec_fields, spec_of
from gspo.run.stored import BASE
from gspo.types import UserError


def parse(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--checkpoint", "--workdir", required=True, help="a workdir (RUN@best, RUN@120), or a step's folder"
    )
    parser.add_argument("--out", required=True, help="folder to write; must be new or empty")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the tensors; float32 loses nothing"
    )
    parser.add_argument("--shard-gb", type=float, default=5.0, help="largest file, in 10^9 bytes")
    parser.add_argument("--tokenizer-dir", default=None, help="folder whose tokenizer files are taken over")
    parser.add_argument("--adapter", action="store_true", help="the adapters of a LoRA run alone, as PEFT reads them")
    parser.add_argument("--base", default=None, help="with --adapter: the model that PEFT is to load under them")
    parser.add_argument("--mesh", default="", help="devices along mesh axes, as in fsdp=8; default: the first device")
    return parser.parse_args(argv)


def describe(checkpoint: Path) -> tuple[ModelSpec, Path | None]:
    """The model of a checkpoint and the folder of its tokenizer: what was saved with the weights, else the model.json
    or config.json at or above them."""
    saved = saved_identity(checkpoint)
    if saved is not None:
        run = run_folder(checkpoint)
        # hf: with the config.json of which an export keeps what is no matter of ours
        known = (run / "hf", run / TOKENIZER, run.parent / TOKENIZER if run.name == BASE else run / TOKENIZER)
        return spec_of(saved), next((path for path in known if path.is_dir()), None)
    for folder in (checkpoint, *checkpoint.absolute().parents[:2]):
        for name in ("model.json", "config.json"):
            if (folder / name).is_file():
                return _described_by(folder / name)
    raise UserError(f"--checkpoint={checkpoint}: there is no config.json or model.json in it or above it")


def _described_by(path: Path) -> tuple[ModelSpec, Path | None]:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        imported = path.name == "model.json"
        fields = spec_fields({"model": content} if imported else content)
        tokenizer = str(path.parent / "hf") if imported else content["tokenizer"]
        if not fields.get("vocab_size"):
            fields["vocab_size"] = make_tokenizer(tokenizer).vocab_size
        spec = ModelSpec(**fields)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} does not describe a model: {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from None
    source = Path(tokenizer) if not tokenizer.startswith("chars:") and Path(tokenizer).exists() else None
    return spec, source.parent if source and source.is_file() else source


def export_adapter(args: argparse.Namespace, spec: ModelSpec, layout: Layout) -> int:
    step, lora, adapters = restore_adapters(args.checkpoint, abstract_params(Transformer(spec), layout))
    if lora is None:
        raise UserError(
            f"--adapter: the run in {args.checkpoint} has no adapters, it trained its weights; leave it out"
        )
    count = export_adapters(adapters, lora, spec, args.out, dtype=args.dtype, base=args.base)
    print(f"{args.out}: adapters of rank {lora.rank} of step {step} for {count} modules, {args.dtype}")
    return 0


def main(argv: list[str]) -> int:
    args = parse(argv)
    if args.shard_gb <= 0:
        raise UserError(f"--shard-gb={args.shard_gb}: must be positive")
    if args.tokenizer_dir and not Path(args.tokenizer_dir).is_dir():
        raise UserError(f"--tokenizer-dir={args.tokenizer_dir}: there is no such folder")
    spec, source = describe(Path(args.checkpoint))
    name = family_of(spec)
    layout = Layout(make_mesh(parse_sizes(args.mesh)))
    if args.adapter:
        return export_adapter(args, spec, layout)
    saved = saved_identity(args.checkpoint)
    export, model = hf.export_params, Transformer(spec)
    if kind_of(saved) == REWARD_MODEL:
        pad_id = (saved["tokenizer"] or {}).get("pad_id")
        export, model, name = partial(export_reward_model, pad_id=pad_id), Critic(spec), "reward model"
    step, params = restore_params(args.checkpoint, abstract_params(model, layout))
    carried = export(
        params,
        spec,
        args.out,
        dtype=args.dtype,
        shard_bytes=int(args.shard_gb * 1e9),
        source=args.tokenizer_dir or source,
    )
    print(
        f"{args.out}: {name} of step {step}, {args.dtype}; carried over: {', '.join(carried) or 'no tokenizer files'}"
    )
    return 0


if __name__ == "__main__":
    cli.run_script(main)
