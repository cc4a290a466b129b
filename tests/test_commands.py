"""Every training command that a page shows is one that composes; every script's command names a
script that is there.
"""

import re
import shlex
from pathlib import Path

import pytest

from pdn.cli.compose import compose
from pdn.cli.launch import quote_home
from pdn.cli.parse import parse

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")])
PAGES += sorted([*ROOT.glob("data/*.md"), *ROOT.glob("examples/*.md")])
FENCE = re.compile(r"^```(?:bash|sh)\n(.*?)^```", re.M | re.S)
FLAGS = ("-m", "--multirun", "--cfg", "job", "--help", "-sc", "install=bash")
PROGRAMS = ("python", "python3", "torchrun", "srun")


def commands(page: Path) -> list[str]:
    """Return the commands of a page's shell blocks, one line each, without comments."""
    found = []
    for block in FENCE.findall(page.read_text()):
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"\s#\s.*$", "", line).strip()
            if line and "…" not in line:
                found.append(line)
    return found


def overrides(command: str) -> list[list[str]] | None:
    """Return the words after ``train.py``, of each trial of a sweep; None for other commands."""
    words = shlex.split(command.replace("$PWD", "/tmp"))
    if not {"train.py", "pdn.cli.train"} & {word.rpartition("/")[2] for word in words}:
        return None
    at = next(i for i, w in enumerate(words) if w.endswith(("train.py", "pdn.cli.train")))
    own = [word for word in words[at + 1 :] if word not in FLAGS and not word.startswith("hydra")]
    own = own[: next((i for i, w in enumerate(own) if w in ("|", ">", "&", "&&", ";")), len(own))]
    own = [re.sub(r"<[^>]*>", "placeholder", word) for word in own]
    if "-m" not in words:
        return [own]
    return [[re.sub(r"=([^,\[{]+),.*", r"=\1", word) for word in own]]


SHOWN = [(page, line) for page in PAGES for line in commands(page)]
TRAINING = [(page, line) for page, line in SHOWN if overrides(line) is not None]


@pytest.mark.parametrize(
    ("page", "command"), TRAINING, ids=[f"{page.stem}:{line[:60]}" for page, line in TRAINING]
)
def test_a_training_command_of_a_page_composes(page, command, monkeypatch):
    if "mine" in command or "$" in command:
        pytest.skip("a reader's own names")
    monkeypatch.setenv("WORLD_SIZE", "1")
    for words in overrides(command):
        parse(compose([quote_home(word) for word in words]), 1)


def test_the_pages_show_training_commands():
    assert len(TRAINING) > 15


def test_the_scripts_of_the_pages_are_there():
    places = {place for _, line in SHOWN for place in re.findall(r"(?:scripts|data)/\w+\.py", line)}
    assert len(places) > 5
    assert [place for place in sorted(places) if not (ROOT / place).is_file()] == []
