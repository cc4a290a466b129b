"""How many bytes of text each token stands for.

It turns nats a token into bits a byte, comparable across tokenizers.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from torch import Tensor

SPACE = "▁"  # stands for a space in SentencePiece vocabularies
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


def token_bytes(tokenizer: Path, vocab_size: int) -> Tensor | None:
    """Count the UTF-8 bytes of each token's text, int64 [vocab_size].

    0 for special tokens and for ids without a token. None for vocabularies that are neither
    byte-level nor SentencePiece's: their tokens do not stand for bytes. Exact for byte-level BPE.
    SentencePiece vocabularies put a space before a text's first word, which is counted here and
    missing in the text: one byte a document too many.

    Args:
        tokenizer: path of a tokenizer.json.
        vocab_size: of the model.
    """
    content = json.loads(Path(tokenizer).read_text(encoding="utf-8"))
    parts = json.dumps(
        [content.get("decoder"), content.get("pre_tokenizer"), content.get("normalizer")],
        ensure_ascii=False,
    )
    if "ByteLevel" in parts:
        size = len  # every character of the vocabulary stands for one byte
    elif SPACE in parts or "Metaspace" in parts:
        size = _sentencepiece_bytes
    else:
        return None
    vocab = content["model"]["vocab"]
    entries = (
        vocab.items()
        if isinstance(vocab, dict)
        else ((token, i) for i, (token, _) in enumerate(vocab))
    )
    sizes = {index: size(token) for token, index in entries}
    for added in content.get("added_tokens", []):
        sizes[added["id"]] = 0 if added["special"] else len(added["content"].encode())
    return torch.tensor([sizes.get(index, 0) for index in range(vocab_size)], dtype=torch.int64)


def _sentencepiece_bytes(token: str) -> int:
    return 1 if BYTE_TOKEN.fullmatch(token) else len(token.replace(SPACE, " ").encode())
