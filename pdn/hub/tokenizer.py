"""A tokenizer.json as the folder that ``AutoTokenizer.from_pretrained`` loads."""

from __future__ import annotations

from pathlib import Path

from pdn.data.codec import parse, read_tokenizer_file, without_dropout


def save_tokenizer(folder: Path, tokenizer: Path, eos_id: int) -> None:
    """Save the tokenizer without a post-processor.

    Some tokenizers put a token before a document, which the model has never seen there.

    Args:
        folder: to save into.
        tokenizer: path of a tokenizer.json.
        eos_id: the token that ends a document; also used for padding.
    """
    from transformers import PreTrainedTokenizerFast

    bare = parse(read_tokenizer_file(tokenizer), str(tokenizer))
    bare.no_truncation()
    bare.no_padding()
    bare.post_processor = None
    without_dropout(bare)
    eos = bare.id_to_token(eos_id)
    PreTrainedTokenizerFast(
        tokenizer_object=bare,
        eos_token=eos,
        pad_token=eos,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,  # as in training: what looks like a special token is text
    ).save_pretrained(folder)
