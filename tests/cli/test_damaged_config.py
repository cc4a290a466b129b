"""Configurations damaged at random: each is refused, or means what it says."""

import copy
import random
import signal
from functools import cache
from typing import get_args

import pytest

from pdn.cli.compose import Composed, compose
from pdn.cli.parse import parse
from pdn.cli.paths import at, leaf_paths
from pdn.errors import ConfigError
from pdn.training.config import RunConfig
from tests.cli.test_bad_files import with_experiment

SIGNED = {"model.mixers.pgdn.preconditioner.mu_init"}  # numbers that may be negative
SEED = 20260424


@cache
def default() -> Composed:
    return compose(["model=pgdn_tiny"])


@cache
def default_config() -> RunConfig:
    return parse(default())


def takes(path: str) -> tuple[bool, bool]:
    """Return whether the key's class lets it be null, and a fraction."""
    *parents, name = path.split(".")
    holder = default_config()
    for part in parents:
        holder = holder[part] if isinstance(holder, dict) else getattr(holder, part)
    if isinstance(holder, dict):
        return False, False
    return type(None) in get_args(type(holder).model_fields[name].annotation), isinstance(
        getattr(holder, name), float
    )


def required(path: str) -> bool:
    """Return whether a configuration without the key is refused: see ``pdn.training.config``."""
    *parents, name = path.split(".")
    holder = default_config()
    for part in parents:
        holder = holder[part] if isinstance(holder, dict) else getattr(holder, part)
    return isinstance(holder, dict) or type(holder).model_fields[name].is_required()


def wrong_values(path: str, old: object) -> list:
    nullable, fractional = takes(path)
    null = [] if nullable else [None]
    below = [] if path in SIGNED or isinstance(old, bool | str | list | dict | None) else [-1 - old]
    match old:
        case bool():
            return [1, 2.5, [old], {"a": 1}, *null]
        case int():
            return [
                str(old),
                True,
                [old],
                {"a": 1},
                *below,
                *null,
                *([] if fractional else [old + 0.5]),
            ]
        case float():
            return [str(old), True, [old], float("nan"), float("inf"), *below, *null]
        case str():
            return [5, [old], {"a": 1}, *null]
        case list():
            return [5, "x", [None], *null]
        case dict():
            return [5, "x", [1], *null]
        case None:
            return [{"a": 1}, [[1]]]


def mutate(values: dict, draw: random.Random) -> str:
    """Make one key of ``values`` wrong, by what its class says; returns its path."""
    groups = {path.rpartition(".")[0] for path in leaf_paths(values)} - {""}
    path = draw.choice([*leaf_paths(values), *sorted(groups)])
    parent, _, name = path.rpartition(".")
    holder = at(parent, values)
    change = draw.choice(["delete", "rename", "replace", "replace", "replace"])
    if change == "delete" and required(path):
        del holder[name]
    elif change in ("delete", "rename"):
        place = draw.randrange(len(name))
        other = name[:place] + draw.choice("xyz") + name[place:]
        holder[other] = holder.pop(name)
        if not required(path):  # then only the other name is a mistake
            path = f"{parent}.{other}".removeprefix(".")
    else:
        holder[name] = draw.choice(wrong_values(path, holder[name]))
    return path


def test_none_of_470_mutated_configurations_is_accepted_or_hangs():
    draw = random.Random(SEED)
    for trial in range(470):
        values = copy.deepcopy(default().values)
        path = mutate(values, draw)
        mutated = Composed(values, values, default().origins, default().source, ())
        with within(5), pytest.raises(ConfigError) as caught:
            parse(mutated, 1)
        message = str(caught.value)
        assert path.split(".")[0] in message, (
            f"seed {SEED}, trial {trial}: {path} is not named in: {message}"
        )
        assert path in message or path.rpartition(".")[0] in message, (
            f"seed {SEED}, trial {trial}: {path}: {message}"
        )


def test_thirty_damaged_files_and_overrides_are_refused_or_mean_what_they_say(tmp_path):
    draw = random.Random(SEED)
    text = (
        "trainer:\n  steps: 700\n  grad_clip: 0.5\noptim:\n  lr: 0.001\n  betas: [0.9, "
        "0.98]\nname: ${model.name}-x\n"
    )
    source = with_experiment(tmp_path, text)
    for trial in range(30):
        damaged, line = list(text), "trainer.steps=700"
        place, junk = draw.randrange(len(text)), draw.choice("\t\0:{[]}*&!%@`'\"#,|>?-${}0x")
        if trial % 3:
            damaged[place : place + draw.randrange(2)] = junk
            overrides = ["experiment=bad"]
        else:
            place = draw.randrange(len(line))
            overrides = [line[:place] + junk + line[place:]]
        (tmp_path / "experiment" / "bad.yaml").write_text(
            "# @package _global_\n" + "".join(damaged)
        )
        with within(60):  # hangs are meant, not a busy machine
            try:
                config = parse(compose(overrides, source), 1)
            except ConfigError as error:
                assert str(error).startswith("pdn[E-CONFIG")
            else:
                # the damage is a comment, a quote, or another valid value, which the types accept
                assert RunConfig.model_validate(config.model_dump(mode="json")) == config


class within:
    """Fail if the block takes longer than so many seconds."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def __enter__(self):
        signal.signal(signal.SIGALRM, self._fail)
        signal.setitimer(signal.ITIMER_REAL, self.seconds)

    def __exit__(self, *exception):
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)

    def _fail(self, *_):
        raise AssertionError(f"no answer within {self.seconds} s")
