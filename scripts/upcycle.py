"""Makes a Mixture of Experts of a dense model, which begins as the same function (sparse upcycling, 2212.05055).

    python scripts/upcycle.py --from=runs/smollm2 --experts=8 --experts_per_token=2 --out=runs/smollm2-moe

--from is what scripts/import_hf.py wrote, or the workdir of any dense run (its latest checkpoint), or the folder of one
step in it. Each layer's feed-forward is copied into the experts, behind a router drawn anew from --seed. Without
--noise the logits are those of the dense model. --split=N cuts every copy into N experts of 1/N of the neurons;
--experts and --experts_per_token, which count those, are then multiples of N (`gspo.model.upcycle` says what holds).
Writes under --out what scripts/import_hf.py writes, so that --config.init_from starts from it, and
scripts/export_hf.py makes a Mixtral folder of it, or a Qwen3-MoE folder where the model normalises queries and keys.
A model with biases there, as Qwen2 has them, becomes what no architecture of Hugging Face is: it trains, but it cannot
be exported.

The copies are alike at first, and only the tokens that they see pull them apart: fine-tune with
--config.router_aux_loss_coef=0.01 to keep them all in use.
"""

import argparse
import json
import shutil
from pathlib import Path

import jax

from gspo.hf import folder as hf
from gspo.hf import start_folder
from gspo.hf.families import family_of, hf_config, read_config
from gspo.model.spec import ModelSpec
from gspo.model.transformer import Transformer, abstract_params, param_shardings
from gspo.model.upcycle import Upcycling
from gspo.parallel.sharding import Layout, make_mesh, parse_sizes
from gspo.run import cli
from gspo.run.checkpoint import restore_params
from gspo.run.identity import TOKENIZER, identity, run_folder, saved_identity, spec_of
from gspo.types import UserError


def parse(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("--from", dest="source", required=True, help="a dense model: workdir, or folder of one step")
    parser.add_argument("--experts", type=int, required=True, help="of each layer")
    parser.add_argument("--experts_per_token", type=int, required=True, help="that run for a token")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--split", type=int, default=1, help="experts that one copy is cut into")
    parser.add_argument("--noise", type=float, default=0.0, help="added to the copies, in standard deviations of each")
    parser.add_argument("--seed", type=int, default=0, help="of the routers and the noise")
    parser.add_argument("--mesh", default="", help="devices along mesh axes, as in fsdp=8; default: the first device")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse(argv)
    out, plan = Path(args.out), Upcycling(args.experts, args.experts_per_token, args.split, args.noise)
    start_folder.check_new(out)
    saved = saved_identity(args.source)
    if saved is None:
        why = "no checkpoint that says what its model is" if Path(args.source).exists() else "there is no such folder"
        raise UserError(f"--from={args.source}: {why}")
    dense = spec_of(saved)
    spec = plan.spec(dense)
    family = _family(spec)
    layout = Layout(make_mesh(parse_sizes(args.mesh)))
    step, params = restore_params(args.source, abstract_params(Transformer(dense), layout))
    params = plan.params(params, jax.random.key(args.seed), param_shardings(Transformer(spec), layout))
    own = identity(spec, None) | {"tokenizer": saved["tokenizer"], "date": saved.get("date")}
    with start_folder.written(out):
        _describe(run_folder(args.source), out, spec if family else None)
        start_folder.save(out, spec, own, params, {"upcycled_from": args.source, "step": step})
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (params, params["blocks"]["moe"])]
    active = sizes[0] - sizes[1] * (plan.experts - plan.experts_per_token) // plan.experts
    what = family or "no Hugging Face architecture, so that it cannot be exported"
    print(f"{out}: {what}, {plan.experts_per_token} of {plan.experts} experts run, {sizes[0]:,} parameters, "
          f"about {active:,} active, from step {step}")  # fmt: skip
    print(start_folder.how_to_start(out, bool(saved["tokenizer"])))
    return 0


def _family(spec: ModelSpec) -> str | None:
    """The architecture of an export; None where there is none."""
    try:
        return family_of(spec)
    except UserError:
        return None


def _describe(source: Path, out: Path, spec: ModelSpec | None) -> None:
    """The files beside the weights: those of the tokenizer, and the config.json that an export begins with, which keeps
    what the source's says of token ids and lengths. spec: None where the model cannot be exported."""
    if (source / TOKENIZER).is_dir():
        shutil.copytree(source / TOKENIZER, out / TOKENIZER, dirs_exist_ok=True)
    files = source / "hf" if (source / "hf").is_dir() else source / TOKENIZER
    hf.carry_over(files, out / "hf")
    if spec is not None:
        base = read_config(files) if (files / "config.json").is_file() else None
        (out / "hf" / "config.json").write_text(json.dumps(hf_config(spec, base=base), indent=2) + "\n")


if __name__ == "__main__":
    cli.run_script(main)
