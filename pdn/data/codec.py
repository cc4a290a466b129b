"""Convert text to token ids and back, for training, evaluation, generation and export alike.

Every tokenizer.json is opened here. What it says about truncation, padding, dropout and tokens
around a text is for its former user. Here a text gives all of its tokens, the same every time, and
no others, and the ids that only the pipeline writes (the end of a document, other special tokens)
never come from text.
"""

from __future__ import annotations

import json
import stat
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from pdn.errors import DataError

LARGEST_VOCABULARY = 1 << 22
"""Ids from here on are refused: the largest vocabularies in use have about a million entries, and
tables (bytes a token, embeddings) grow with the largest id.
"""
PIECE_CHARACTERS = 1 << 19
"""Longer texts are encoded piece by piece: a tokenizer takes some 200 bytes a character."""
BOUNDARY_SEARCH = 1 << 16
MAX_LOST = 0.01
"""Share of the characters of a sample that may be lost before a tokenizer is refused for it."""


class Unencodable(DataError):
    """Tells that a tokenizer cannot carry a text. `index` is its place in the batch."""

    def __init__(self, code: str, message: str, index: int = 0):
        super().__init__(code, message)
        self.index = index


def read_tokenizer_file(path: Path) -> bytes:
    """Return the bytes of a tokenizer.json.

    Raises:
        DataError: there is no regular, readable file.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise DataError(
                "TOKENIZER-MISSING",
                f"{path}: not a regular file; expected a tokenizer.json; give its path",
            )
        return path.read_bytes().removeprefix(b"\xef\xbb\xbf")  # the mark is no JSON
    except FileNotFoundError:
        raise DataError(
            "TOKENIZER-MISSING",
            f"{path}: no such file; expected a tokenizer.json, a directory with one, or a hub name",
        ) from None
    except OSError as error:
        raise DataError(
            "TOKENIZER-MISSING",
            f"{path}: {error.strerror}; expected a readable tokenizer.json; fix its permissions",
        ) from error


def parse(content: bytes, name: str):
    """Return the `tokenizers.Tokenizer` in `content`, as it is written there.

    Raises:
        DataError: malformed, or with ids beyond `LARGEST_VOCABULARY`.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(content.decode())
        largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    except BaseException as error:  # a panic in Rust is a BaseException
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise DataError(
            "TOKENIZER-JSON",
            f"{name}: not a tokenizer.json: {error}; expected the JSON of a tokenizer: export it "
            "again with save_pretrained()",
        ) from None
    if largest >= LARGEST_VOCABULARY:
        raise DataError(
            "TOKENIZER-IDS",
            f"{name}: holds the id {largest:,}; expected ids below {LARGEST_VOCABULARY:,}: the "
            "embedding has a row for each; export it again with save_pretrained()",
        )
    return tokenizer


def without_dropout(tokenizer) -> None:
    """Make a `tokenizers.Tokenizer` give a text the same tokens every time.

    Some were saved with the dropout of merges that they were trained with.
    """
    if getattr(tokenizer.model, "dropout", None) is not None:
        tokenizer.model.dropout = None


class Codec:
    """Encodes and decodes with a tokenizer, by the rules of this module.

    Args:
        content: of the tokenizer.json.
        name: for messages.
        eos_id: the id that ends a document; None where only decoding matters.
    """

    def __init__(self, content: bytes, name: str, eos_id: int | None):
        self.name, self.eos_id = name, eos_id
        self._tokenizer = tokenizer = parse(content, name)
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.post_processor = None
        without_dropout(tokenizer)
        vocab = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        self._unknown = _unknown_id(json.loads(content), vocab)
        added = tokenizer.get_added_tokens_decoder().items()
        reserved = {i for i, token in added if token.special and i != self._unknown}
        if eos_id is not None:
            reserved.add(eos_id)
        self._reserved = np.zeros(self.vocab_size, bool)
        self._reserved[[i for i in reserved if i < self.vocab_size]] = True

    def ids(self, text: str) -> list[int]:
        """Return the token ids of `text`.

        Raises:
            Unencodable: the tokenizer fails on it.
        """
        return self.encode([text])[0].tolist()

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Return the token ids of each text, uint32.

        Beyond the ids themselves, memory does not grow with the length of a text.

        Raises:
            Unencodable: the tokenizer fails on one of them.
        """
        if sum(map(len, texts)) <= PIECE_CHARACTERS:
            return self._encode(texts, 0)
        found, group, size = [], [], 0
        for text in texts:
            if len(text) <= PIECE_CHARACTERS and size + len(text) <= PIECE_CHARACTERS:
                group.append(text)
                size += len(text)
                continue
            found += self._encode(group, len(found))
            group, size = [], 0
            if len(text) <= PIECE_CHARACTERS:
                group, size = [text], len(text)
            else:
                parts = [self._encode([piece], len(found))[0] for piece in pieces(text)]
                found.append(np.concatenate(parts))
        return found + self._encode(group, len(found))

    def _encode(self, texts: list[str], first: int) -> list[np.ndarray]:
        """Encode a batch whose first text is number `first` of the caller's."""
        if not texts:
            return []
        try:
            batch = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise self._failed_text(texts, first, error) from None
        rows = [np.array(e.ids, np.uint32) for e in batch]
        for i, row in enumerate(rows):
            if self._reserved[row].any():
                try:
                    rows[i] = np.array(self._without_reserved(texts[i]), np.uint32)
                except Unencodable as error:
                    raise Unencodable(error.code, error.args[0], first + i) from None
        return rows

    def _failed_text(self, texts: list[str], first: int, error: BaseException) -> Unencodable:
        """Say which of `texts` the tokenizer fails on."""
        for i, text in enumerate(texts):
            try:
                self._tokenizer.encode(text, add_special_tokens=False)
            except BaseException as again:
                if isinstance(again, KeyboardInterrupt | SystemExit):
                    raise
                return Unencodable(
                    "TOKENIZER-TEXT",
                    f"{text[:60]!r}: the tokenizer {self.name} fails on it ({again}); expected "
                    "tokens for every text: give a tokenizer with an unknown token or, better, "
                    "byte fallback",
                    first + i,
                )
        return Unencodable("TOKENIZER-TEXT", f"the tokenizer {self.name} fails: {error}", first)

    def _without_reserved(self, text: str) -> list[int]:
        """Encode a text in which the tokenizer sees a special token: cut each such place in two."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        spans = [s for i, s in zip(encoding.ids, encoding.offsets) if self._reserved[i]]
        if not spans:
            return encoding.ids
        if any(end - start < 2 for start, end in spans):
            start = next(start for start, end in spans if end - start < 2)
            raise Unencodable(
                "TOKENIZER-RESERVED",
                f"{text[max(0, start - 20) : start + 20]!r}: the tokenizer {self.name} gives a "
                "special token for text, which would end the document or worse; expected that "
                "only the end of a document is one: set data.eos_token to a token of its own",
            )
        cuts = sorted({0, len(text), *(start + 1 for start, _ in spans)})
        return [i for a, b in pairwise(cuts) for i in self._without_reserved(text[a:b])]

    def decode(self, ids: list[int], *, special: bool = False) -> str:
        """Return the text of `ids`; `special` shows special tokens, too."""
        return self._tokenizer.decode(ids, skip_special_tokens=not special)

    def lost_characters(self, texts: list[str]) -> tuple[int, int]:
        """Return how many characters of `texts` do not survive, and how many there are.

        White space does not count. A character is lost if no known token stands for it, or if it is
        missing in what the tokens decode to, whichever gives more. What the tokenizer's own
        normalizer rewrites (case, compatibility forms) is not lost.
        """
        lost = total = 0
        for text in texts:
            for piece in pieces(text):
                visible = np.array([not c.isspace() for c in piece], bool)
                total += int(visible.sum())
                encoding = self._tokenizer.encode(piece, add_special_tokens=False)
                covered = np.zeros(len(piece), bool)
                for i, (start, end) in zip(encoding.ids, encoding.offsets):
                    if i != self._unknown:
                        covered[start:end] = True
                known = [i for i in encoding.ids if i != self._unknown]
                lost += max(int((visible & ~covered).sum()), self._missing(piece, known))
        return lost, total

    def _missing(self, text: str, ids: list[int]) -> int:
        """Count characters of `text`, or of its normalised form, that decoded `ids` lack."""
        if self._tokenizer.decoder is None:
            return 0
        decoded = _visible(self._tokenizer.decode(ids, skip_special_tokens=True))
        forms = [text]
        if self._tokenizer.normalizer is not None:
            forms.append(self._tokenizer.normalizer.normalize_str(text))
        return min((_visible(form) - decoded).total() for form in forms)


def open_codec(path: Path | str, eos_id: int | None) -> Codec:
    """Open a tokenizer.json, such as that of a run.

    Raises:
        DataError: missing or malformed.
    """
    return Codec(read_tokenizer_file(Path(path)), str(path), eos_id)


def pieces(text: str) -> Iterator[str]:
    """Cut `text` into pieces of at most `PIECE_CHARACTERS`, between words where that is possible.

    Between words the tokenizers in use give the same tokens as for the whole text.
    """
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        end = start + PIECE_CHARACTERS
        for at in range(end, end - BOUNDARY_SEARCH, -1):
            if text[at] == " " and text[at - 1].isalnum() and text[at + 1 : at + 2].isalpha():
                end = at
                break
        yield text[start:end]
        start = end
    yield text[start:]


def require_survival(codec: Codec, sample: list[tuple[str, str]], source: str, most: float) -> str:
    """Refuse a tokenizer that loses more than the share `most` of a sample; return a line about it.

    Args:
        codec: the tokenizer.
        sample: pairs of a text and its place, as messages name it.
        source: what the texts are from, as messages name it.
        most: share of characters that may be lost, 0 to 1.

    Raises:
        DataError: it loses more, or fails.
    """
    texts = [text for _, text in sample]
    try:
        codec.encode(texts)
    except Unencodable as error:
        place = sample[error.index][0]
        raise Unencodable(error.code, f"{place}: {error.args[0]}") from None
    lost, total = codec.lost_characters(texts)
    share = lost / max(1, total)
    line = f"{lost:,} of {total:,} characters of a sample ({share:.2%}) are lost"
    if share > most:
        raise DataError(
            "TOKENIZER-LOSS",
            f"{source}: {line} when {codec.name} encodes them, as it has no tokens for them; "
            f"expected at most {most:.2%}: give a tokenizer with byte fallback that fits the text, "
            "or allow the loss with data.max_lost_characters (--max-lost-characters)",
        )
    return f"{source}: {line} in {codec.name}"


def _visible(text: str) -> Counter[str]:
    return Counter(c for c in text if not c.isspace() and c not in "\u2581\ufffd")


def _unknown_id(content: dict[str, Any], vocab: dict[str, int]) -> int | None:
    """Return the id that stands for text without a token, if the model has one."""
    model = content.get("model") or {}
    if model.get("type") == "Unigram":
        return model.get("unk_id")
    unknown = model.get("unk_token")
    return None if unknown is None else vocab.get(unknown)
