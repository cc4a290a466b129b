"""What a task of lm-eval asks of generated answers, its ``generation_kwargs``: all honoured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pdn.errors import ConfigError
from pdn.inference.sampling import Sampling

MAX_NEW_TOKENS = 256  # where a task does not say
# lm-eval's names of one thing, the first one that is given counts
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# what changes nothing at this value, and is refused at any other
NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1}
KNOWN = {"until", "do_sample", "temperature", "top_k", "top_p", *LENGTHS, *NEUTRAL}


@dataclass(frozen=True)
class Generation:
    """Says how the answers of a task are generated.

    Attributes:
        how: the next token is chosen.
        max_new_tokens: of an answer.
        stops: texts that end an answer, and are no part of it.
    """

    how: Sampling
    max_new_tokens: int
    stops: tuple[str, ...]


def read_generation(task: str, options: Mapping[str, Any], repeats: int = 1) -> Generation:
    """Return what ``options`` say, by lm-eval's rules.

    Without ``do_sample`` a temperature above 0 samples; ``do_sample: false`` never does.

    Args:
        task: named in errors.
        options: the task's ``generation_kwargs``; one that is null is not given.
        repeats: answers of each document.

    Raises:
        ConfigError: an option that is not honoured here, a value out of range, or repeats that
            would all be the same.
    """

    def refused(found: str, expected: str) -> ConfigError:
        return ConfigError(
            "EVAL-GENERATION", f"{task}: generation_kwargs: {found}; expected {expected}"
        )

    given = {key: value for key, value in options.items() if value is not None}
    for key, value in given.items():
        if key not in KNOWN or (key in NEUTRAL and value != NEUTRAL[key]):
            known = ", ".join(sorted(KNOWN - NEUTRAL.keys()))
            raise refused(f"{key}: {value!r} is not supported", f"only {known}")
    until = given.get("until", [])
    until = [until] if isinstance(until, str) else until
    if not isinstance(until, list) or not all(isinstance(stop, str | None) for stop in until):
        raise refused(f"until: {until!r}", "a text or a list of texts")
    length = next((given[key] for key in LENGTHS if key in given), MAX_NEW_TOKENS)
    if not isinstance(length, int) or length < 1:
        raise refused(f"max_gen_toks: {length!r}", "a number of tokens, 1 or more")
    temperature = given.get("temperature", 0.0)
    if given.get("do_sample") and not temperature:
        raise refused("do_sample: true without a temperature", "one, such as temperature: 1.0")
    if not given.get("do_sample", True):
        temperature = 0.0
    try:
        how = Sampling(
            float(temperature),
            top_k=None if given.get("top_k", 0) in (0, -1) else given["top_k"],
            top_p=given.get("top_p", 1.0),
        )
    except (TypeError, ValueError) as error:
        raise refused(str(error), "numbers within these ranges") from None
    if repeats > 1 and how.temperature == 0:
        raise refused(
            f"repeats: {repeats} at temperature 0, where every answer is the same",
            "do_sample: true with a temperature above 0, or repeats: 1",
        )
    return Generation(how, length, tuple(stop for stop in until if stop))
