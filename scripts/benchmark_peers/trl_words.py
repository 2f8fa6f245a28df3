"""A tokenizer of numbers for TRL: "t17 t4" is [17, 4]. Imported when the environment is set that transformers reads."""

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers


def make_tokenizer(words: int, end: int, pad: int) -> transformers.PreTrainedTokenizerFast:
    """The ids 0 .. words - 1, one that ends a completion, and one that pads on the left."""
    vocab = {f"t{i}": i for i in range(words)} | {"<eos>": end, "<pad>": pad}
    model = Tokenizer(models.WordLevel(vocab, unk_token="t0"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token="<eos>", pad_token="<pad>", padding_side="left"
    )
