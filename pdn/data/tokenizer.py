"""Tokenizers: loaded from a file or a hub name, or trained here.

They are checked, and identified by the hash of their file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from pdn.data.codec import Codec, parse, read_tokenizer_file
from pdn.data.failures import SILENCE, WAYS_OUT, is_passing, unanswered
from pdn.data.shards import TokenizerIdentity
from pdn.errors import DataError, DataStorageError

EOS = "<|endoftext|>"
KNOWN_EOS = (EOS, "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>")


@dataclasses.dataclass(frozen=True)
class TokenizerFile:
    """Holds what the pipeline needs of a tokenizer: its tokenizer.json and what that says."""

    name: str
    content: bytes
    vocab_size: int
    eos_id: int

    @property
    def identity(self) -> TokenizerIdentity:
        return TokenizerIdentity(name=self.name, sha256=hashlib.sha256(self.content).hexdigest())

    def build(self) -> Codec:
        """Return the codec.

        Text that looks like a special token is text, so that only the pipeline writes EOS.
        """
        return Codec(self.content, self.name, self.eos_id)


def load(name: str, *, revision: str | None, eos_token: str | None) -> TokenizerFile:
    """Load a tokenizer.

    Args:
        name: path of a tokenizer.json or of a directory with one, or a name on the Hugging Face
            hub.
        revision: commit of the hub repository, or None for its main branch.
        eos_token: the token that ends a document; None takes the tokenizer_config.json's beside it,
            then the usual names.

    Raises:
        DataError: missing, malformed, without an EOS token, or only usable by running code from its
            repository.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        _refuse_remote_code(path)
        path = path / "tokenizer.json"
    elif (
        not path.exists()
        and not name.endswith(".json")
        and name.count("/") <= 1
        and not name.startswith((".", "~", "/"))
    ):
        path = _from_hub(name, revision)
    content = read_tokenizer_file(path)
    tokenizer = parse(content, name)
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    if not vocab:
        raise DataError(
            "TOKENIZER-JSON",
            f"{name}: its vocabulary is empty; export it again with save_pretrained()",
        )
    return TokenizerFile(
        name, content, max(vocab.values()) + 1, _eos_id(vocab, name, path, eos_token)
    )


def _eos_id(vocab: dict[str, int], name: str, path: Path, eos_token: str | None) -> int:
    if eos_token is not None:
        if eos_token not in vocab:
            usual = [word for word in KNOWN_EOS if word in vocab]
            raise DataError(
                "TOKENIZER-EOS",
                f"{name}: eos_token {eos_token!r} is not in its vocabulary of {len(vocab)}; name "
                "one that is" + (f", as {', '.join(map(repr, usual))}" if usual else ""),
            )
        return vocab[eos_token]
    configured = None
    beside = path.with_name("tokenizer_config.json")
    if beside.is_file():
        try:
            configured = json.loads(beside.read_bytes()).get("eos_token")
        except (ValueError, AttributeError, OSError) as error:
            raise DataError(
                "TOKENIZER-JSON", f"{beside}: malformed ({error}); restore it or set eos_token"
            ) from None
        configured = configured.get("content") if isinstance(configured, dict) else configured
        if configured is not None and not (isinstance(configured, str) and configured in vocab):
            raise DataError(
                "TOKENIZER-EOS",
                f"{beside}: its eos_token {configured!r} is not in the vocabulary of {name}; mend "
                "it, or set data.eos_token to the token that ends a document",
            )
    for candidate in (configured, *KNOWN_EOS):
        if candidate in vocab:
            return vocab[candidate]
    raise DataError(
        "TOKENIZER-EOS",
        f"{name}: no end-of-document token; expected one of {list(KNOWN_EOS)}; set data.eos_token "
        "to its name",
    )


def _refuse_remote_code(directory: Path) -> None:
    config = directory / "tokenizer_config.json"
    if (
        not (directory / "tokenizer.json").is_file()
        and config.is_file()
        and b"auto_map" in config.read_bytes()
    ):
        raise DataError("TOKENIZER-CODE", f"{directory}: {remote_code}")


remote_code = (
    "has no tokenizer.json, only code of its own (auto_map), which is never run; expected a "
    "tokenizer.json: convert it once with transformers and save_pretrained(), and give that "
    "directory"
)


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def download(file: str) -> Path:
        return Path(hf_hub_download(name, file, revision=revision))

    _require_hub(name, revision)
    try:
        path = download("tokenizer.json")
    except GatedRepoError:
        raise DataError(
            "TOKENIZER-GATED",
            f"{name}: gated; expected an account that may read it: accept its terms at "
            f"https://huggingface.co/{name} and set HF_TOKEN, or give a tokenizer.json",
        ) from None
    except HFValidationError:
        raise DataError(
            "TOKENIZER-MISSING",
            f"{name}: neither a local path nor the name of a repository; expected a "
            "tokenizer.json, a directory with one, or owner/name on the hub, whose commit is "
            "data.tokenizer_revision",
        ) from None
    except RepositoryNotFoundError as error:
        raise DataError(
            "TOKENIZER-MISSING",
            f"{name}: found neither a local path nor one on the hub ({type(error).__name__}); "
            "expected a tokenizer.json: check the name",
        ) from None
    except RevisionNotFoundError:
        raise DataError(
            "TOKENIZER-MISSING",
            f"{name}@{revision}: the hub has this repository, but no such revision; expected a "
            "commit, branch or tag of it: correct data.tokenizer_revision",
        ) from None
    except LocalEntryNotFoundError as error:  # offline, although it is a kind of EntryNotFoundError
        raise _unreachable(name, error) from error
    except EntryNotFoundError:
        raise DataError("TOKENIZER-CODE", f"{name}: {remote_code}") from None
    except Exception as error:  # the client's own kinds for a failing network
        raise _unreachable(name, error) from error
    with contextlib.suppress(EntryNotFoundError):
        download("tokenizer_config.json")  # also fetched, for the name of the EOS token
    return path


def _require_hub(name: str, revision: str | None) -> None:
    """Ask the hub once where nothing is cached: the client alone would try for half a minute.

    What the hub answers, the download finds again.

    Raises:
        DataStorageError: it does not answer.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        if isinstance(try_to_load_from_cache(name, "tokenizer.json", revision=revision), str):
            return
        HfApi().model_info(name, revision=revision, timeout=SILENCE)
    except Exception as error:
        if getattr(error, "response", None) is None and is_passing(error):
            raise _unreachable(name, error) from error


def _unreachable(name: str, error: Exception) -> DataStorageError:
    return DataStorageError(
        "TOKENIZER-HUB",
        f"{name}: no such local path, and the hub {unanswered(error)}; expected its answer: give "
        f"data.tokenizer=<tokenizer.json>, {WAYS_OUT}",
    )


def train(texts: Iterable[str], vocab_size: int) -> TokenizerFile:
    """Train a byte-level BPE on `texts`; deterministic in them.

    Args:
        texts: documents.
        vocab_size: entries, at least 257: 256 bytes and the EOS token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        tokenizer.train_from_iterator(texts, trainer)
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    return TokenizerFile(
        f"bpe-{vocab_size}",
        tokenizer.to_str(pretty=True).encode(),
        max(vocab.values()) + 1,
        vocab[EOS],
    )


def encode(codec: Codec, eos_id: int, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Encode whole documents, each ended by EOS, and concatenate their tokens.

    Args:
        codec: the tokenizer.
        eos_id: of the token that ends a document.
        texts: the documents.

    Returns:
        tokens uint32 [N] and the documents' ends int64 [len(texts)].

    Raises:
        Unencodable: the tokenizer fails on a text.
    """
    rows = codec.encode(texts)
    ends = np.cumsum([len(row) + 1 for row in rows], dtype=np.int64)
    tokens = np.empty(int(ends[-1]) if len(ends) else 0, dtype=np.uint32)
    start = 0
    for row, end in zip(rows, ends.tolist()):
        tokens[start : end - 1] = row
        tokens[end - 1] = eos_id
        start = end
    return tokens, ends
