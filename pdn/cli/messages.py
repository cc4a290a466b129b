"""The wording of every configuration error: item and place, found, expected, fix.

Several are reported together.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pdn.errors import ConfigError

# names of keys in other trainers, and the ends of the keys' paths here
SAME_AS = {
    "learning_rate": "optim.lr",
    "max_lr": "optim.lr",
    "beta1": "optim.betas",
    "beta2": "optim.betas",
    "max_steps": "trainer.steps",
    "num_steps": "trainer.steps",
    "max_iters": "trainer.steps",
    "total_steps": "trainer.steps",
    "batch_size": "trainer.global_batch_size",
    "train_batch_size": "trainer.global_batch_size",
    "per_device_train_batch_size": "trainer.micro_batch_size",
    "max_grad_norm": "trainer.grad_clip",
    "clip_grad": "trainer.grad_clip",
    "gradient_clip_val": "trainer.grad_clip",
    "warmup": "schedule.warmup_steps",
    "num_warmup_steps": "schedule.warmup_steps",
    "lr_scheduler": "schedule.kind",
    "save_every": "checkpoint.every",
    "save_steps": "checkpoint.every",
    "eval_every": "eval.every",
    "eval_steps": "eval.every",
    "max_seq_len": "data.seq_len",
    "sequence_length": "data.seq_len",
    "context_length": "data.seq_len",
    "block_size": "data.seq_len",
    "hidden_size": "model.d_model",
    "n_layer": "model.num_layers",
    "num_hidden_layers": "model.num_layers",
    "n_head": "model.num_heads",
    "wandb_project": "logger.project",
}
VALUES_SAME_AS = {"gpu": "cuda", "bfloat16": "bf16", "float32": "fp32", "tf32": "fp32"}


@dataclass(frozen=True)
class Problem:
    """Describes one mistake: a short stable tag and its message."""

    code: str
    text: str


def problem(code: str, item: str, found: str, expected: str, fix: str) -> Problem:
    """Return a mistake in the wording that all messages have.

    Args:
        code: a short stable tag, such as ``CONFIG-VALUE``.
        item: the key or the file that is wrong, and where it was written.
        found, expected, fix: what follows those words, and how to correct it.
    """
    return Problem(code, f"{item}: found {found}; expected {expected}; {fix}")


def refusal(problems: Iterable[Problem]) -> ConfigError:
    """Return one error that reports all ``problems``, each once."""
    unique = list(dict.fromkeys(problems))
    if len(unique) == 1:
        return ConfigError(unique[0].code, unique[0].text)
    codes = {problem.code for problem in unique}
    lines = "\n  ".join(problem.text for problem in unique)
    return ConfigError(
        codes.pop() if len(codes) == 1 else "CONFIG", f"{len(unique)} problems:\n  {lines}"
    )


def refuse_if(problems: Sequence[Problem]) -> None:
    """Raise one ConfigError for ``problems``, if there are any."""
    if problems:
        raise refusal(problems)


def show(value: object) -> str:
    """Show a value as a user would write it; text is quoted, so that '1' and 1 look different."""
    if isinstance(value, str):
        text = f"'{value}'"
    else:
        try:
            text = json.dumps(value)
        except (TypeError, ValueError):
            text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def nearest(name: str, options: Iterable[str], count: int = 3) -> list[str]:
    """Return the options that ``name`` was probably meant to be, best first.

    Args:
        name: what was written.
        options: that exist.
        count: most to return.
    """
    options = sorted(set(options))
    close = difflib.get_close_matches(name, options, n=count, cutoff=0.6)
    close = close or difflib.get_close_matches(name.lower(), options, n=count, cutoff=0.6)
    return (
        close
        or [option for option in options if name and (option.startswith(name) or name in option)][
            :count
        ]
    )


def _alike(name: str, options: Iterable[str]) -> list[str]:
    """Return the options that are almost ``name``, or have all of its words, best first."""
    close = difflib.get_close_matches(name, options, n=3, cutoff=0.76)
    words = set(name.split("_"))
    return close or [option for option in options if words <= set(option.split("_"))][:3]


def one_of(options: Iterable[str], place: str = "") -> str:
    """Return ``one of a, b, c``; of many, the first few and where the others are."""
    options = sorted(options)
    if len(options) == 1:
        return options[0]
    if len(options) > 20:
        where = f" in {place}" if place else ""
        return f"one of the {len(options)} names{where}, e.g. {', '.join(options[:4])}"
    return f"one of {', '.join(options)}"


def did_you_mean(name: object, options: Iterable[str]) -> str | None:
    """Return ``did you mean a or b?``, or None where no option is near."""
    options = list(options)
    close = nearest(name, options) if isinstance(name, str) else []
    if isinstance(name, str) and VALUES_SAME_AS.get(name.lower()) in options:
        close = [VALUES_SAME_AS[name.lower()]]
    return f"did you mean {' or '.join(close)}?" if close else None


def unknown_key(
    path: str,
    leaf: str,
    place: str,
    siblings: Iterable[str],
    elsewhere: Iterable[str],
    choices: Sequence[str] = (),
    groups: Sequence[str] = (),
) -> Problem:
    """Describe an unknown key, with the nearest valid ones: beside it, or of a like name elsewhere.

    Args:
        path: the key that its parent does not have.
        leaf: what was written: ``path``, or a key below it.
        siblings: names of the keys that its parent has.
        elsewhere: dotted paths of all keys of the configuration.
        choices: those of its group that have the key, such as ``data=text``.
        groups: those that have a choice of its name.
    """
    parent, _, name = path.rpartition(".")
    end = leaf.rpartition(".")[2]
    elsewhere = list(elsewhere)
    meant_key = [other for other in elsewhere if other.endswith(SAME_AS.get(end, "\0"))]
    shallow = [other for other in elsewhere if other.count(".") <= 1]
    beside = [f"{parent}.{other}" if parent else other for other in nearest(name, siblings)]
    same = [other for other in shallow if other.rpartition(".")[2] == end][:2]
    ends = {other.rpartition(".")[2]: other for other in shallow}
    like = [ends[other] for other in _alike(end, ends)]
    suggestions = meant_key + same + beside + like if leaf == path else same + like
    suggestions = suggestions if leaf == path else meant_key + suggestions
    suggestions = list(dict.fromkeys(suggestions))[:3]
    meant = f"did you mean {' or '.join(suggestions)}?" if suggestions else "remove it"
    if choices and not meant_key:
        one = len(choices) == 1
        meant = f"{', '.join(choices)} {'has' if one else 'have'} it: "
        meant += f"remove it, or choose {'that' if one else 'one of them'}"
        meant += f"; did you mean {beside[0]}?" if beside else ""
    if groups and not suggestions:
        meant = f"write {' or '.join(f'{group}={name}' for group in groups)}"
    expected = one_of(siblings) if siblings else "no keys here"
    return problem("CONFIG-KEY", f"{leaf} ({place})", "an unknown key", expected, meant)


def no_group(name: str, place: str, options: list[str]) -> Problem:
    expected = one_of(options, f"configs/{name}")
    return Problem(
        "CONFIG-GROUP",
        f"{name} ({place}): found nothing chosen; expected {expected}: set {name}=<name>",
    )
