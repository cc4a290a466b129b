"""The wording of every configuration error: item and place, found, expected, fix.

Several are reported together.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence

from pdn.errors import ConfigError

# keys, or the ends of their paths, and what other trainers call them
OTHER_NAMES = {
    "optim.lr": "learning_rate max_lr",
    "optim.betas": "beta1 beta2",
    "trainer.steps": "max_steps num_steps max_iters total_steps",
    "trainer.global_batch_size": "batch_size train_batch_size",
    "trainer.micro_batch_size": "per_device_train_batch_size",
    "trainer.grad_clip": "max_grad_norm clip_grad gradient_clip_val",
    "schedule.warmup_steps": "warmup num_warmup_steps",
    "schedule.kind": "lr_scheduler",
    "checkpoint.every": "save_every save_steps",
    "eval.every": "eval_every eval_steps",
    "data.seq_len": "max_seq_len sequence_length context_length block_size",
    "model.d_model": "hidden_size",
    "model.num_layers": "n_layer num_hidden_layers",
    "model.num_heads": "n_head",
    "logger.project": "wandb_project",
}
SAME_AS = {name: key for key, names in OTHER_NAMES.items() for name in names.split()}
VALUES_SAME_AS = {"gpu": "cuda", "bfloat16": "bf16", "float32": "fp32", "tf32": "fp32"}


def problem(code: str, item: str, found: str, expected: str, fix: str) -> ConfigError:
    """Return a mistake in the wording that all messages have.

    Args:
        code: a short stable tag, such as ``CONFIG-VALUE``.
        item: the key or the file that is wrong, and where it was written.
        found, expected, fix: what follows those words, and how to correct it.
    """
    return ConfigError(code, f"{item}: found {found}; expected {expected}; {fix}")


def given(code: str, key: str, found: str, expected: str, fix: str) -> ConfigError:
    """Return a mistake in what the command line says of a key."""
    return problem(code, f"{key} (command line)", found, expected, fix)


def refusal(problems: Iterable[ConfigError]) -> ConfigError:
    """Return one error that reports all ``problems``, each once."""
    unique = list({str(problem): problem for problem in problems}.values())
    if len(unique) == 1:
        return unique[0]
    codes = {problem.code for problem in unique}
    code = codes.pop() if len(codes) == 1 else "CONFIG"
    lines = [f"{len(unique)} problems:", *(problem.args[0] for problem in unique)]
    return ConfigError(code, "\n  ".join(lines))


def refuse_if(problems: Sequence[ConfigError]) -> None:
    """Raise one ConfigError for ``problems``, if there are any."""
    if problems:
        raise refusal(problems)


def show(value: object) -> str:
    """Show a value as a user would write it; text is quoted, so that '1' and 1 look different."""
    text = f"'{value}'" if isinstance(value, str) else json.dumps(value, default=repr)
    return text if len(text) <= 80 else text[:77] + "..."


def nearest(name: str, options: Iterable[str]) -> list[str]:
    """Return the options that ``name`` was probably meant to be, at most three, best first."""
    options = sorted(set(options))
    close = difflib.get_close_matches(name, options, n=3, cutoff=0.6)
    close = close or difflib.get_close_matches(name.lower(), options, n=3, cutoff=0.6)
    return close or [option for option in options if name and name in option][:3]


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
) -> ConfigError:
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
    tails = [other for other in elsewhere if other.endswith(f".{leaf}") and "." in leaf]
    same = tails + [other for other in shallow if other.rpartition(".")[2] == end][:2]
    ends = {other.rpartition(".")[2]: other for other in shallow}
    like = [ends[other] for other in _alike(end, ends)]
    suggestions = meant_key + same + (beside if leaf == path else []) + like
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


def no_group(name: str, place: str, options: list[str]) -> ConfigError:
    expected = one_of(options, f"configs/{name}")
    item, fix = f"{name} ({place})", f"set {name}=<name>"
    return problem("CONFIG-GROUP", item, "nothing chosen", expected, fix)
