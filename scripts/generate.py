"""Prints what a model answers: a trained policy, or one that scripts/import_hf.py brought in.

    python scripts/generate.py --workdir=runs/smollm2 "What is 7 times 8? Answer with a number."
    python scripts/generate.py --workdir=runs/gspo --num=4 --temperature=0.7 --logps "What is 7 times 8?"
    echo "What is 7 times 8?" | python scripts/generate.py --workdir=runs/gspo

The question goes through the tokenizer's chat template, where it has one, as in training; --raw continues it as it
stands. Without a question, standard input is the question; at a terminal, each line is one, until Ctrl-D. --logps adds
each token with its log-probability under softmax(logits / temperature), at temperature 0 under softmax(logits).
"""

import argparse
import sys
from collections.abc import Callable, Iterator

import jax
import numpy as np

from gspo.data.batches import left_padded
from gspo.data.hf_tokenizer import HFTokenizer
from gspo.data.tokenizer import Tokenizer
from gspo.learning.sampler import make_sampler
from gspo.model.distribution import Sampling
from gspo.policy import load_policy, prompt_width
from gspo.run import cli, machine
from gspo.types import Rollout, UserError


def parse(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="?", help="the user's message; default: standard input")
    parser.add_argument("--workdir", required=True, help="a run, a folder of import_hf.py, or one step's checkpoint")
    parser.add_argument("--num", type=int, default=1, help="completions of the question [%(default)s]")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy [%(default)s]")
    parser.add_argument("--max_tokens", type=int, default=128, help="at most, for each completion [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of the draws [%(default)s]")
    parser.add_argument("--logps", action="store_true", help="print each token with its log-probability")
    parser.add_argument("--raw", action="store_true", help="leave the chat template out")
    args = parser.parse_args(argv)
    for name in ("num", "max_tokens"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name}={getattr(args, name)}: must be positive")
    if args.temperature < 0:
        raise UserError(f"--temperature={args.temperature}: must be >= 0 (0 is greedy)")
    return args


def open_model(args: argparse.Namespace) -> tuple[Tokenizer, Callable[[str, int], Rollout]]:
    """The tokenizer of the weights, and complete(question, which of the session) -> the rows of its completions."""
    model, tokenizer, params = load_policy(args.workdir, f"--workdir={args.workdir}")
    sampler = make_sampler(
        model,
        num_generations=args.num,
        max_completion_length=args.max_tokens,
        eos_ids=tokenizer.eos_ids,
        pad_id=tokenizer.pad_id,
        sampling=Sampling(args.temperature),
    )

    def complete(question: str, which: int) -> Rollout:
        ids = raw_ids(tokenizer, question) if args.raw else tokenizer.prompt_ids(question)
        if not ids:
            raise UserError("the question is empty: nothing to continue from")
        width = prompt_width(len(ids))
        key = jax.random.fold_in(jax.random.key(args.seed), which)
        prompt_QP = left_padded([ids], width, tokenizer.pad_id)
        return jax.device_get(sampler(params, prompt_QP, np.array([len(ids)], np.int32), key))

    return tokenizer, complete


def raw_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The text as it stands, behind a beginning-of-sequence token where the model wants one and it has none."""
    ids = tokenizer.encode(text)
    return tokenizer.begun(ids) if isinstance(tokenizer, HFTokenizer) else ids


def questions(given: str | None) -> Iterator[str]:
    if given is not None:
        yield given
    elif sys.stdin.isatty():
        try:
            while True:
                yield input("> ")
        except EOFError:
            print()
    else:
        yield sys.stdin.read().rstrip("\n")


def show(rollout: Rollout, tokenizer: Tokenizer, logps: bool) -> None:
    num, width = rollout.logp_BC.shape
    for row in range(num):
        length = int(rollout.completion_lengths_B[row])
        ids = rollout.tokens_BT[row, -width:][:length].tolist()
        if num > 1:
            print(f"[{row + 1}/{num}]")
        print(tokenizer.decode(ids))
        if rollout.truncated_B[row]:
            print(f"(cut off at --max_tokens={width})", file=sys.stderr)
        if logps:
            logp_C = rollout.logp_BC[row, :length]
            for token, logp in zip(ids, logp_C.tolist(), strict=True):
                print(f"{logp:9.4f}  {tokenizer.decode([token])!r}" + "  (end)" * (token in tokenizer.eos_ids))
            print(f"{logp_C.sum():9.4f}  over {length} tokens")
    sys.stdout.flush()


def main(argv: list[str]) -> int:
    args = parse(argv)
    machine.keep_programs()
    tokenizer, complete = open_model(args)
    for which, question in enumerate(questions(args.question)):
        show(complete(question, which), tokenizer, args.logps)
    return 0


if __name__ == "__main__":
    cli.run_script(main)
