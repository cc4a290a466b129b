"""Text that the model writes: to be read, not scored."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pdn.data.codec import open_codec
from pdn.errors import ConfigError
from pdn.evals.probes.base import About, Probe, Subject
from pdn.evals.results import Estimate, mean_of
from pdn.inference.sampling import Sampling, stream_seed


class ContinuationsProbe(Probe):
    """Samples after each prompt, with the same random numbers at every step of a run."""

    kind: Literal["continuations"]
    prompts: list[str] = Field(min_length=1)  # an empty one begins a document
    max_new_tokens: int = Field(ge=1)
    temperature: float = Field(ge=0)
    top_k: int | None = Field(ge=1)
    seed: int

    def options(self) -> set[str]:
        return set()

    def check(self, about: About) -> None:
        if about.tokenizer is None:
            raise ConfigError(
                "EVAL-SUBJECT", "continuations: needs a model of text; this one has no tokenizer"
            )

    def run(self, subject: Subject) -> dict[str, Estimate]:
        """Return ``tokens``: how many there are before the end of the document.

        The texts are samples.
        """
        assert subject.tokenizer is not None and subject.eos_id is not None
        tokenizer = open_codec(subject.tokenizer, subject.eos_id)
        prompts = [tokenizer.ids(prompt) or [subject.eos_id] for prompt in self.prompts]
        written = subject.scorer.continuations(
            prompts,
            max_new_tokens=self.max_new_tokens,
            eos_id=subject.eos_id,
            how=Sampling(self.temperature, self.top_k),
            seeds=[stream_seed(self.seed, number) for number in range(len(prompts))],
        )
        for number, (prompt, tokens) in enumerate(zip(self.prompts, written, strict=True)):
            text = tokenizer.decode(tokens)
            subject.samples.append(
                {"task": "continuations", "doc_id": number, "arguments": prompt}
                | {"filtered_resps": text, "target": None, "metrics": {"tokens": len(tokens)}}
            )
        return {"tokens": mean_of([float(len(tokens)) for tokens in written])}
