"""The command line of train.py: one trial, many trials, or one of Hydra's own flags.

It also decides how a launch ends. Hydra, pydantic and torch load inside of functions, so that
Ctrl-C during their import is answered cleanly too.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pdn.cli.process import INTERRUPTED, restore_interrupts
from pdn.cli.ranks import Ranks
from pdn.errors import ConfigError, PdnError, StorageError
from pdn.runs.output import guarded_output

if TYPE_CHECKING:
    from pdn.cli.compose import Composed, Source
    from pdn.training.config import RunConfig

LONG_FLAG = re.compile(r"-[A-Za-z]\w{2,}.*")  # with one dash, of which argparse makes short flags
HOME = re.compile(r"(?<=[=,\[:])~[^,\[\]{}'\"]*")
Train = Callable[["RunConfig"], None]
DEFAULT_CACHE = "~/.cache/pdn"  # as in configs/data
REFUSED = {  # flags of Hydra
    "experimental_rerun": "would run the code in a pickle",
    "config_path": "would leave configs/ out, which every run needs; --config-dir adds a directory",
    "config_name": "would leave configs/train.yaml out, which every run needs; --config-dir adds a "
    "directory, for an experiment/<name>.yaml of yours",
}


def main(argv: Sequence[str], train: Train) -> int:
    """Run the command line and return the exit code; every failure has been reported once.

    Until a run remembers signals, or a sweep starts trials, Ctrl-C ends the process at once: most
    of what is imported is imported here.

    Args:
        argv: the arguments after the program's name.
        train: called once with the configuration, on every rank.
    """
    argv = [quote_home(word) for word in argv]
    ranks, code = None, 0
    with contextlib.ExitStack() as output:
        try:
            ranks = Ranks()
            told = ranks.agree(lambda: {"values": _prepare(argv, ranks, output), "cache": _cache()})
            values = _in_own_cache(told["values"], told["cache"])
            from pdn.training.config import RunConfig

            output.enter_context(guarded_output())
            train(RunConfig.model_validate(values))
        except BaseException as error:
            code = report(error, ranks)
        if ranks is not None:
            ranks.leave()
    return code


def _cache() -> str:
    return os.environ.get("PDN_CACHE", DEFAULT_CACHE)


def _in_own_cache(values: dict[str, Any], first: str) -> dict[str, Any]:
    """Return rank 0's values with the data cached where this node's own PDN_CACHE says.

    Nodes may have disks of other names; a ``data.cache_dir`` that was given holds for all of them.

    Args:
        values: as rank 0 has composed them, which has put its own PDN_CACHE in.
        first: the PDN_CACHE of rank 0.
    """
    data = values["data"]
    moves = data.get("cache_dir") == first
    return values | {"data": data | {"cache_dir": _cache()}} if moves else values


def quote_home(word: str) -> str:
    """Quote the values of a ``key=~/place`` word, which Hydra's grammar has no ``~`` for.

    What opens the file expands it, as the shell does not after an ``=``.
    """
    key, equals, value = word.partition("=")
    if not equals or key.startswith("-") or "~" not in value or "'" in value or '"' in value:
        return word
    return f"{key}={HOME.sub(lambda found: repr(found[0]), f'={value}')[1:]}"


def _prepare(argv: Sequence[str], ranks: Ranks, output: contextlib.ExitStack) -> dict[str, Any]:
    """Return the values to train with.

    Only rank 0 comes here. What is printed to a reader that has gone is dropped from now on if
    there is something to train.

    Raises:
        SystemExit: there is nothing to train: a mistake has been reported, a sweep or one of
            Hydra's flags is done.
    """
    try:
        arguments = _read(argv)
        if not arguments.multirun and not _asks_hydra(arguments):
            output.enter_context(guarded_output())
            return _compose(arguments, ranks.size)
        _through_hydra(arguments, argv, ranks.size)
        raise SystemExit(0)
    except BaseException as error:
        # Report before the other ranks hear of it: torchrun ends all ranks when the first exits.
        raise SystemExit(report(error, ranks)) from None


def _read(argv: Sequence[str]) -> argparse.Namespace:
    from hydra._internal.utils import get_args_parser

    def refuse(message: str) -> NoReturn:
        raise ConfigError(
            "COMMAND-LINE",
            f"command line: {message}; expected key=value or one of Hydra's flags: see --help",
        )

    parser = get_args_parser()
    parser.error = refuse
    for action in parser._actions:
        if action.dest == "version":  # of Hydra
            vars(action)["version"] = f"pdn {sys.modules['pdn'].__version__}"
    odd = [word for word in argv if LONG_FLAG.fullmatch(word)]
    known = [word for word in argv if word not in odd]
    arguments, unknown = parser.parse_known_intermixed_args(known)
    # as they were written, since a flag that is none may have its value behind it
    arguments.overrides = sorted([*arguments.overrides, *unknown, *odd], key=argv.index)
    for flag, why in REFUSED.items():
        if getattr(arguments, flag) is not None:
            refuse(f"--{flag.replace('_', '-')} {why}")
    return arguments


def _asks_hydra(arguments: argparse.Namespace) -> bool:
    """Return whether a flag asks for something else than training."""
    asked = "help", "hydra_help", "cfg", "info", "shell_completion"
    return any(getattr(arguments, name) for name in asked)


def _source(arguments: argparse.Namespace) -> Source:
    from pdn.cli.compose import Source

    added = arguments.config_dir
    if added is None:
        return Source()
    if not Path(added).is_dir():
        text = f"--config-dir: {added} is not a directory; expected one that holds YAML files"
        raise ConfigError("COMMAND-LINE", text)
    return Source((Path(added),))


# ------------------------------------------------------------ one trial


def _compose(arguments: argparse.Namespace, world_size: int) -> dict[str, Any]:
    from pdn.cli.compose import compose
    from pdn.cli.parse import parse
    from pdn.training.devices import check_devices

    composed = compose(arguments.overrides, _source(arguments))
    config = parse(composed, world_size)
    if not config.trainer.dry_run:  # a dry run may describe another machine's run
        check_devices(config.trainer.device, config.ops.backend, config.model.implementation)
    _say_default_data(composed)
    return composed.values


def _say_default_data(composed: Composed) -> None:
    chosen = {override.key_or_group for override in composed.overrides}
    data = composed.values["data"]
    if not {"data", "experiment"} & chosen and data.get("kind") == "text" and not data["path"]:
        others = ", ".join(name for name in composed.source.options("data") if name != "text")
        print(f"data     none chosen: the embedded text; data=<name> takes another: {others}")


# ------------------------------------------------------------ many trials, and Hydra's flags


def _through_hydra(arguments: argparse.Namespace, argv: Sequence[str], world_size: int) -> None:
    """Hand over to Hydra what is no single trial, after our own check of its words."""
    from pdn.cli.overrides import parse_overrides

    words = own = list(arguments.overrides)
    source = _source(arguments)
    if arguments.multirun:
        from pdn.cli.sweep import check_trials, for_trials_alone

        _refuse_inside_torchrun(world_size)
        check_trials(words, source)
        own = for_trials_alone(words)
    elif arguments.help or arguments.cfg:
        parse_overrides(words)
    flags = list(argv)
    for word in words:
        flags.remove(word)
    _hydra_main([*flags, *own])


def _refuse_inside_torchrun(world_size: int) -> None:
    if world_size > 1:
        count = os.environ.get("LOCAL_WORLD_SIZE", world_size)
        raise ConfigError(
            "SWEEP",
            "torchrun … -m: found a sweep inside of torchrun, where every rank would run all "
            "trials; expected torchrun inside of the sweep: python train.py -m … "
            f"hydra/launcher=torchrun hydra.launcher.nproc_per_node={count}",
        )


def _hydra_main(argv: Sequence[str]) -> None:
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from pdn.cli.compose import CONFIGS, MAIN

    def task(_: object) -> None:
        """Refuse a launcher that is not ours: ours give every trial a process of its own."""
        raise ConfigError(
            "SWEEP",
            "hydra/launcher: found one that is not of pdn; expected basic, torchrun or slurm: "
            "choose one of them",
        )

    task.__module__ = "train"  # what Hydra calls the program in its help
    sys.argv = [sys.argv[0], *argv]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise to us instead of printing
    restore_interrupts()
    try:
        hydra.main(config_path=str(CONFIGS.absolute()), config_name=MAIN, version_base="1.3")(
            task
        )()
    except (HydraException, OmegaConfBaseException, ValueError, TypeError) as error:
        raise ConfigError("CONFIG", " ".join(f"{error} {error.__cause__ or ''}".split())) from None


# ------------------------------------------------------------ the end


def _tell_torchrun(error: PdnError) -> None:
    """Have torchrun end its own report, which comes last and is long, with the reason."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        said = {"message": error.args[0], "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps(said), encoding="utf-8")


def _explained(error: BaseException) -> BaseException:
    """Return an error in place of one of torch's that only tells of a socket."""
    if "torch.distributed" not in sys.modules:
        return error
    from pdn.distributed.peers import explain, is_broken_exchange

    return explain(error) if is_broken_exchange(error) else error


# What a file system or a limit refuses, wherever it is met: not a fault of ours
_REFUSALS = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE, errno.ELOOP),
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.EMFILE, errno.ENFILE, errno.ENAMETOOLONG),
}


def _of_this_machine(error: BaseException) -> BaseException:
    """Return a StorageError in place of the operating system's refusal of a file that it names."""
    if not isinstance(error, OSError) or error.errno not in _REFUSALS or not error.filename:
        return error
    from pdn.store.local import storage_error

    return storage_error(error, Path(os.fsdecode(error.filename)))


def report(error: BaseException, ranks: Ranks | None) -> int:
    """Print why the launch ends, once among all ranks, and return the exit code."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 0 if error.code is None else 70
    first = ranks is None or ranks.first_to_report()
    if isinstance(error, KeyboardInterrupt):
        if first:
            print("interrupted", file=sys.stderr)
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):
        # as in `train.py --help | head`; Python would complain once more at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        error = StorageError(
            "IO", "standard output: its reader has closed it; expected a reader or a file"
        )
    error = _of_this_machine(_explained(error))
    if isinstance(error, PdnError):
        if first:
            print(error, file=sys.stderr, flush=True)
        _tell_torchrun(error)
        return error.exit_code
    if first or ranks is None:
        traceback.print_exception(error)
    else:
        reason = " ".join(str(error).split())[:200]
        print(
            f"rank {ranks.rank} ended too: {type(error).__name__}: {reason}",
            file=sys.stderr,
            flush=True,
        )
    return 70
