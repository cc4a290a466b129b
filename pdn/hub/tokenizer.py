"""A tokenizer.json as the folder that ``AutoTokenizer.from_pretrained`` loads."""

from __future__ import annotations

import json
from pathlib import Path


def save_tokenizer(folder: Path, tokenizer: Path, eos_id: int) -> None:
    """Without a post-processor: the model has never seen a token before a document, as some
    tokenizers put there.

    eos_id: the token that ends a document; also used for padding.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    content = json.loads(tokenizer.read_text()) | {"post_processor": None}
    bare = Tokenizer.from_str(json.dumps(content))
    eos = bare.id_to_token(eos_id)
    PreTrainedTokenizerFast(
        tokenizer_object=bare, eos_token=eos, pad_token=eos, clean_up_tokenization_spaces=False
    ).save_pretrained(folder)
