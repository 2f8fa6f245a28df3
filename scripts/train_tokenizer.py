"""Trains a byte-level BPE tokenizer on the text of a task and saves it as a folder that `make_tokenizer` reads.

    python scripts/train_tokenizer.py --task=tfds:gsm8k --vocab_size=2048 --out=runs/tokenizer

The vocabulary begins with <pad>, <eos> and the 256 bytes, so that every text has an encoding; merges are learned from
prompts and demonstrations (answers, where there are none). Digits stay single tokens: arithmetic on numbers that were
cut at random places is harder to learn. Writes tokenizer.json and tokenizer_config.json, and prints the lengths that a
config has to allow for."""

import argparse
import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from gspo.data.tasks import Task, make_task
from gspo.data.tokenizer import make_tokenizer
from gspo.run import cli
from gspo.types import UserError

PAD, EOS = "<pad>", "<eos>"
SMALLEST = 256 + 2


def parse(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("--task", required=True, help="tfds:gsm8k, jsonl:<path>, reasoning_gym:<name> or running_sum")
    parser.add_argument("--split", default="train", help="the split to learn from; leave the test split alone")
    parser.add_argument("--size", type=int, default=None, help="learn from the first examples only")
    parser.add_argument("--vocab_size", type=int, default=2048, help=f"at least {SMALLEST}")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a tokenizer that is already there")
    return parser.parse_args(argv)


def texts_of(task: Task) -> list[str]:
    examples = [task[i] for i in range(len(task))]
    return [
        text for ex in examples for text in (ex.prompt, ex.answer if ex.demonstration is None else ex.demonstration)
    ]


def train_bpe(texts: list[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def main(argv: list[str]) -> int:
    args = parse(argv)
    out = Path(args.out)
    if args.vocab_size < SMALLEST:
        raise UserError(f"--vocab_size={args.vocab_size} is too small: {PAD}, {EOS} and the 256 bytes need {SMALLEST}")
    if (out / "tokenizer.json").exists() and not args.overwrite:
        raise UserError(f"{out} already holds a tokenizer: choose another --out, or pass --overwrite")
    try:
        task = make_task(args.task, split=args.split, size=args.size)
    except UserError as error:
        flags = (
            ("task.options.size", "--size"),
            ("task.name", "--task"),
            ("task.train_split, task.eval_split", "--split"),
        )
        text = str(error)
        for field, flag in flags:
            text = text.replace(field, flag)
        raise UserError(text) from None
    texts = texts_of(task)
    trained = train_bpe(texts, args.vocab_size)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "tokenizer.json").write_text(trained.to_str(pretty=True) + "\n", encoding="utf-8")
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": PAD, "eos_token": EOS}
        (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out={out} cannot be written: {error.strerror}") from None

    tokenizer = make_tokenizer(str(out))
    tokens = [tokenizer.encode(text) for text in texts]
    lossy = [text for text, ids in zip(texts, tokens, strict=True) if tokenizer.decode(ids) != text]
    if lossy:
        raise UserError(f"{len(lossy)} texts do not survive encoding and decoding, the first of them {lossy[0][:60]!r}")
    num_bytes = sum(len(text.encode()) for text in texts)
    prompts = np.array([len(tokenizer.prompt_ids(text)) for text in texts[::2]])
    completions = np.array([len(ids) for ids in tokens[1::2]])
    print(
        f"{out}: {tokenizer.vocab_size} tokens, {num_bytes / sum(map(len, tokens)):.2f} bytes per token on "
        f"{len(task)} examples"
    )
    for what, lengths in (("prompts", prompts), ("completions with <eos>", completions + 1)):
        print(
            f"{what}: mean {lengths.mean():.0f}, 99% {np.percentile(lengths, 99):.0f}, longest {lengths.max()} tokens"
        )
    return 0


if __name__ == "__main__":
    cli.run_script(main)
