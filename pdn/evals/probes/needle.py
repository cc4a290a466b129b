"""A needle in a haystack (S-NIAH of RULER, arXiv 2404.06654) at any length, in any text.

It needs no download.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from pdn.data.codec import Codec, open_codec
from pdn.data.records import read_whole
from pdn.errors import ConfigError, DataError
from pdn.evals.probes.base import About, Probe, Subject
from pdn.evals.results import Estimate, mean_of

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind}s for {key} is: {value}."
TASK = (
    "Some special magic {kind}s are hidden within the following text. Make sure to memorize it. I "
    "will quiz you about it."
)
QUESTION = "What is the special magic {kind} for {key} mentioned in the provided text?"
ANSWER = "The special magic {kind} for {key} mentioned in the provided text is"
WORDS = [
    ["quiet", "amber", "frozen", "gentle", "hollow", "ivory", "jagged", "lucid", "mellow", "nimble",
     "ornate", "placid",
     "quick", "rustic", "silent", "tidy", "upbeat", "velvet", "wistful", "zesty"],
    ["anchor", "basket", "candle", "desert", "engine", "forest", "garden", "harbor", "island",
     "jacket", "kettle", "ladder",
     "meadow", "needle", "orchard", "pencil", "quarry", "ribbon", "saddle", "tunnel"],
]  # fmt: skip


Value = Literal["number", "uuid"]


class NeedleProbe(Probe):
    """Hides a sentence with a key and a value in ``length`` tokens, and asks for it at the end.

    S-NIAH-1: haystack noise, value number. S-NIAH-2: haystack text, value number. S-NIAH-3:
    haystack text, value uuid.
    """

    kind: Literal["needle"]
    haystack: Literal["noise", "text"]  # text: the file that text= names
    value: Value  # seven digits, or 36 characters
    lengths: list[int] = Field(min_length=1)  # tokens, all in all
    examples: int = Field(ge=1)  # at each length
    seed: int

    def options(self) -> set[str]:
        return {"lengths", "text"} if self.haystack == "text" else {"lengths"}

    def check(self, about: About) -> None:
        if about.tokenizer is None:
            raise ConfigError(
                "EVAL-SUBJECT", "needle: needs a model of text; this one has no tokenizer"
            )
        self._examples(about, [min(self._lengths(about))])

    def run(self, subject: Subject) -> dict[str, Estimate]:
        """Return ``accuracy@L`` and ``loss@L``.

        Accuracy: the value is in the continuation. Loss: nats a token of the value, given all
        before it.
        """
        assert subject.tokenizer is not None  # as it was checked
        tokenizer, found = open_codec(subject.tokenizer, subject.eos_id), {}
        for length, examples in self._examples(subject, self._lengths(subject)).items():
            found |= self._score(subject, tokenizer, length, examples)
        return found

    def _lengths(self, about: About) -> tuple[int, ...]:
        return about.lengths or tuple(self.lengths)

    def _examples(
        self, about: About, lengths: Sequence[int]
    ) -> dict[int, list[tuple[list[int], str]]]:
        """Return, by length, prompts and values."""
        assert about.tokenizer is not None
        tokenizer = open_codec(about.tokenizer, about.eos_id)
        sentences = _sentences(self._haystack(about))
        sizes = [len(ids) for ids in tokenizer.encode([f" {s}" for s in sentences])]
        return {
            n: [self._example(tokenizer, sentences, sizes, n, i) for i in range(self.examples)]
            for n in lengths
        }

    def _haystack(self, about: About) -> str:
        if self.haystack == "noise":
            return NOISE
        if about.text is None:
            raise ConfigError(
                "EVAL-DATA",
                "needle: haystack = text, but no text is given; expected text=<file>, of "
                "scripts/evaluate.py only",
            )
        return read_text(about.text)

    def _example(
        self, tokenizer: Codec, sentences: list[str], sizes: list[int], length: int, number: int
    ):
        """Return (prompt tokens, value), which together have at most ``length`` tokens."""
        rng = random.Random(f"{self.seed}/{length}/{number}")
        (needle, task, question, answer), value = _drawn(rng, self.value)
        frame = len(tokenizer.ids(f"{task}\n{needle}\n{question} {answer} {value}"))
        # 4 tokens are left for the spaces at the joints
        start, room, hay = rng.randrange(len(sentences)), length - frame - 4, []
        while (size := sizes[(start + len(hay)) % len(sentences)]) <= room:
            room -= size
            hay.append(sentences[(start + len(hay)) % len(sentences)])
        if not hay:
            raise ConfigError(
                "EVAL-LENGTH",
                f"needle: found a length of {length} tokens, and the question alone takes {frame}; "
                f"expected at least {2 * frame}: give longer ones, in configs/eval/tasks or, to "
                "scripts/evaluate.py, as lengths=",
            )
        hay.insert(rng.randrange(len(hay) + 1), needle)
        return tokenizer.ids(f"{task}\n{' '.join(hay)}\n{question} {answer}"), value

    def _score(
        self,
        subject: Subject,
        tokenizer: Codec,
        length: int,
        examples: list[tuple[list[int], str]],
    ) -> dict[str, Estimate]:
        values = [tokenizer.ids(f" {value}") for _, value in examples]
        prompts = [prompt for prompt, _ in examples]
        longest = max(map(len, values))
        texts = subject.scorer.continuations(
            prompts, max_new_tokens=longest + 8, eos_id=subject.eos_id
        )
        hits = [
            value in tokenizer.decode(tokens)
            for (_, value), tokens in zip(examples, texts, strict=True)
        ]
        log_probs = subject.scorer.whole().loglikelihoods(list(zip(prompts, values, strict=True)))
        nats = -sum(log_prob for log_prob, _ in log_probs) / sum(map(len, values))
        return {
            f"accuracy@{length}": mean_of([float(hit) for hit in hits]),
            f"loss@{length}": Estimate(nats, n=len(hits)),
        }


def training_text(number: int, kind: Value, sentences: int) -> str:
    """Return a text of the probe's form in noise, its answer included, for models to learn it from.

    Key, value and place are drawn from ``number`` alone, and not as those that the probe asks for.

    Args:
        number: of the text.
        kind: of the value.
        sentences: of noise, at most; at least a tenth of that.
    """
    rng = random.Random(f"training/{number}")
    (needle, task, question, answer), value = _drawn(rng, kind)
    noise, start = _sentences(NOISE), rng.randrange(5)
    count = rng.randint(max(1, sentences // 10), sentences)
    hay = [noise[(start + i) % len(noise)] for i in range(count)]
    hay.insert(rng.randrange(count + 1), needle)
    return f"{task}\n{' '.join(hay)}\n{question} {answer} {value}."


def _drawn(rng: random.Random, kind: Value) -> tuple[list[str], str]:
    """Draw a key and a value; return needle, task, question and answer with them, and the value."""
    key = "-".join(rng.choice(words) for words in WORDS)
    value = (
        str(rng.randrange(10**6, 10**7))
        if kind == "number"
        else str(uuid.UUID(int=rng.getrandbits(128), version=4))
    )
    words = {"kind": kind, "key": key, "value": value}
    return [part.format(**words) for part in (NEEDLE, TASK, QUESTION, ANSWER)], value


def _sentences(text: str) -> list[str]:
    sentences = [
        f"{part.strip(' .')}." for part in text.replace("\n", " ").split(". ") if part.strip(" .")
    ]
    if not sentences:
        raise ConfigError(
            "EVAL-DATA", "needle: the haystack is empty; expected text with sentences"
        )
    return sentences


def read_text(path: Path) -> str:
    """Read a UTF-8 file, plain or .gz.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return read_whole(path)
    except DataError as error:
        raise ConfigError(
            "EVAL-DATA",
            f"text={path}: {error.args[0]}; expected a readable UTF-8 file, plain, .gz or .zst",
        ) from None
