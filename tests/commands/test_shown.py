"""Every command that is shown does the same in both shells, with words that its program takes.

The programs are stubs that record what they are given; `test_running.py` has the real ones.
"""

import argparse
import importlib
import itertools
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from pdn.cli.compose import compose
from pdn.cli.launch import quote_home
from pdn.cli.options import parse as parse_options
from pdn.cli.parse import parse
from tests.commands.catalogue import BASH_ALONE, NOT_RUN, filled_in, reason_not_to_run, shells
from tests.commands.pages import (
    FENCE,
    HELPFUL,
    INLINE,
    PAGES,
    ROOT,
    Command,
    all_commands,
    of_help,
    of_page,
)
from tests.commands.small import BENCHMARKS

COMMANDS = [command for command in all_commands() if shells(command)]
# What is run, or stands in a page without being ours: another name is to be classified first.
KNOWN = {
    "python", "torchrun", "srun", "docker", "make", "pytest", "hf", "pip", "wandb", "aws",
    "scontrol", "id", "git", "mkdir", ".",
}  # fmt: skip
# It says a command that does nothing: some lines evaluate or pass on what a program prints.
STUB = """#!/bin/sh
{ printf '%s\\0' "$(basename "$0")" "$@"; printf '\\2'; export -p; printf '\\1'; } >> "$RECORD"
echo :
"""
OF_THE_SHELL = ("PWD", "OLDPWD", "SHLVL", "_", "RECORD")  # variables that each sets for itself
FLAGS = ("-m", "--multirun", "--help", "-sc", "install=bash")


@pytest.fixture(scope="module")
def stubs(tmp_path_factory) -> Path:
    """Make a folder to be PATH, whose programs record what they are given, and do nothing."""
    folder = tmp_path_factory.mktemp("bin")
    for name in KNOWN - {"."}:
        (folder / name).write_text(STUB)
        (folder / name).chmod(0o755)
    for name in ("basename", "head"):
        (folder / name).symlink_to(shutil.which(name))
    return folder


@dataclass(frozen=True)
class Done:
    """What a line did in a shell.

    Attributes:
        calls: what each program was given, its name first.
        variables: the exported ones that it saw.
        output: of the line.
        files: that it left, with their contents.
    """

    calls: list[list[str]]
    variables: list[list[str]]
    output: str
    files: dict[str, str]


def done_by(shell: str, text: str, stubs: Path, folder: Path) -> Done:
    """Run a line in a folder that has nothing of what was run before."""
    here, record = folder / "here", folder / "record"
    shutil.rmtree(here, ignore_errors=True)
    record.unlink(missing_ok=True)
    (here / ".venv" / "bin").mkdir(parents=True)
    (here / ".venv" / "bin" / "activate").write_text("")
    environment = {"PATH": str(stubs), "RECORD": str(record), "HOME": "/home/reader"}
    done = subprocess.run(
        [shutil.which(shell), "-c", text],
        env=environment,
        cwd=here,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, ""), text
    seen = record.read_text().split("\1")[:-1] if record.exists() else []
    words, exported = zip(*(call.split("\2") for call in seen)) if seen else ((), ())
    own = tuple(f"export {name}=" for name in OF_THE_SHELL)
    return Done(
        [given.split("\0")[:-1] for given in words],
        [[line for line in lines.splitlines() if not line.startswith(own)] for lines in exported],
        done.stdout,
        {str(f.relative_to(here)): f.read_text() for f in here.rglob("*") if f.is_file()},
    )


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_both_shells_do_the_same_with_words_that_programs_take(
    command, stubs, tmp_path, monkeypatch
):
    if "<TAB>" in command.text or " (" in command.text:
        pytest.skip(reason_not_to_run(command))
    text = filled_in(command.text)
    assert not re.search(r"…|<[a-z]", text), "what stands for this in the tests? see PLACEHOLDERS"
    done = [done_by(shell, text, stubs, tmp_path) for shell in shells(command)]
    assert done[1:] in ([], [done[0]])
    assert done[0].calls or text.startswith(". ")
    monkeypatch.setenv("WORLD_SIZE", "1")
    for words in done[0].calls:
        check(words, command)


@pytest.mark.parametrize(
    "text",
    [
        "python train.py model={gdn,pgdn}_tiny",
        "python train.py seed=$((RANDOM * 0 + ${#PATH[@]}))",
        "python train.py <<< yes",
        "python train.py &> log",
        "source .venv/bin/activate",
        "A=(1 2); python train.py",
        "A=x; A+=y python train.py",
        "declare -x A=1; python train.py",
    ],
)
def test_what_works_in_bash_alone_is_noticed(text, stubs, tmp_path):
    bash = done_by("bash", text, stubs, tmp_path)
    with pytest.raises(AssertionError):
        assert done_by("dash", text, stubs, tmp_path) == bash


def check(words: list[str], command: Command) -> None:
    """Parse the words after a program of ours, wherever it stands in a command."""
    ours = [i for i, w in enumerate(words) if w.endswith(".py") and (ROOT / w).is_file()]
    if not ours or "pytest" in words:
        files = [w for w in words if w.startswith(("tests/", "scripts/", "data/"))]
        # what is the reader's own is not there yet
        assert all((ROOT / w).exists() for w in files if not w.endswith("_mine.py"))
        return
    script, own = words[ours[0]], words[ours[0] + 1 :]
    if "mine" in command.text and "name=mine" not in command.text:
        return  # names files that the reader writes: test_running.py has them
    if script == "train.py":
        for trial in trials(own):
            compose_for(tuple(trial), world_size(words[: ours[0]]))
    elif script == "scripts/benchmark.py":
        benchmark_options(own[0]).parse_args(own[1:])
    elif script.startswith("data/"):
        runpy.run_path(str(ROOT / script))["arguments"]().parse_args(own)
    elif script.startswith("scripts/"):
        check_options(script, own)


@cache
def compose_for(words: tuple[str, ...], ranks: int) -> None:
    parse(compose([quote_home(word) for word in words]), ranks)


def world_size(launcher: list[str]) -> int:
    """Return the number of processes that torchrun's words ask for."""
    given = dict(itertools.pairwise(launcher))
    nodes, here = given.get("--nnodes", "1"), given.get("--nproc-per-node", "1")
    return int(nodes or 1) * int(here)  # a variable of Slurm's is empty here


def trials(own: list[str]) -> list[list[str]]:
    """Return the overrides of a launch, of the first trial of a sweep; of no launch, none."""
    if "install=bash" in own:
        return []
    kept = [word for word in own if word not in FLAGS and not word.startswith("hydra")]
    if "-m" in own:
        kept = [re.sub(r"=([^,\[{]+),.*", r"=\1", word) for word in kept]
    return [kept]


@cache
def benchmark_options(name: str) -> argparse.ArgumentParser:
    if str(ROOT / "scripts") not in sys.path:
        sys.path.append(str(ROOT / "scripts"))
    options = argparse.ArgumentParser(exit_on_error=False)
    importlib.import_module(f"benchmarks.{name}").add_arguments(options)
    return options


def check_options(script: str, own: list[str]) -> None:
    program = runpy.run_path(str(ROOT / script))
    if script == "scripts/runs.py":
        assert own[0] in program["COMMANDS"] and len(own) > 1
        return
    kind = program["Options"]
    if script in ("scripts/sweep.py", "scripts/estimate.py"):  # the rest goes to train.py
        own = [word for word in own if word.partition("=")[0] in kind.model_fields]
    runs = [word for word in own if "=" not in word]
    assert not runs or script in ("scripts/plot.py", "scripts/report.py")
    parse_options(kind, [w for w in own if "=" in w and "." not in w.partition("=")[0]])


def test_every_reason_not_to_run_a_command_is_that_of_one():
    texts = [command.text for command in all_commands()]
    stale = [p for p, _ in NOT_RUN + BASH_ALONE if not any(re.search(p, text) for text in texts)]
    assert not stale


def test_every_benchmark_has_a_small_form_on_a_cpu():
    commands = {path.stem for path in (ROOT / "scripts/benchmarks").glob("[!_]*.py")}
    assert commands == set(BENCHMARKS)


def test_a_program_that_nobody_has_classified_is_noticed(stubs, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```bash\nnobody --knows this\n```\n")
    (command,) = commands_of(page)
    with pytest.raises(AssertionError, match="not found"):
        done_by("dash", command.text, stubs, tmp_path)


def commands_of(page: Path) -> list[Command]:
    import tests.commands.pages as pages

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "ROOT", page.parent)
        return list(of_page(page))


def test_commands_are_found_in_blocks_sentences_and_help(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "Say `python train.py\nseed=1`, not `train.py`.\n\n"
        "```bash\nexport A=1   # why\npython \\\n    train.py  # a comment\n```\n"
        "```fish\npython train.py | source\n```\n"
    )
    assert [(c.text, c.shell) for c in commands_of(page)] == [
        ("export A=1; python train.py", "bash"),
        ("python train.py | source", "fish"),
        ("python train.py seed=1", "bash"),
    ]
    assert "python train.py model=pgdn_tiny data=text trainer.steps=200" in [
        c.text for c in of_help(ROOT / "train.py")
    ]


def test_no_block_without_a_language_holds_commands():
    found = []
    for page in PAGES:
        for language, block in FENCE.findall(page.read_text()):
            lines = [line for line in block.splitlines() if not language and INLINE.match(line)]
            found += [(page.name, line) for line in lines if " → " not in line]
    assert [(p, line) for p, line in found if not re.match(r"\w+\.py {3,}", line)] == []


# The help of a benchmark is that of one of several commands.
TYPED = [f for f in HELPFUL if f.name != "benchmark.py" and f.parent.name != "benchmarks"]


@pytest.mark.parametrize("file", TYPED, ids=lambda file: str(file.relative_to(ROOT)))
def test_help_shows_a_command_that_can_be_typed(file):
    commands = list(of_help(file))
    assert commands and all(c.text.split()[0] in ("python", "torchrun") for c in commands)
