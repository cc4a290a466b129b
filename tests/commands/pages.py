"""The commands that the project tells a reader to run, wherever it does.

They stand in the shell blocks of the pages and in their sentences between backquotes, in the help
of the programs, in the comments of configs/, and in the Makefile.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES += sorted([*ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md")])
PROGRAMS = [ROOT / "train.py", *sorted(ROOT.glob("scripts/*.py")), *sorted(ROOT.glob("data/*.py"))]
HELPFUL = [*PROGRAMS, *sorted(ROOT.glob("scripts/benchmarks/[a-z]*.py"))]
HELPFUL += sorted(ROOT.glob("examples/*.py"))

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
SHELLS = ("bash", "sh", "zsh", "fish")
SPAN = re.compile(r"`([^`]+)`")
# What a command between backquotes begins with. In a shell block every line is one.
STARTS = (
    r"(?:\.|python3?|torchrun|srun|sbatch|docker|make|pytest|hf|pip|wandb|tensorboard|source|git)"
)
PATH_OF_OURS = r"(?:(?:scripts|data|examples)/)?\w+\.py"
INLINE = re.compile(rf"(?:[A-Z_]+=\S+ )*(?:{STARTS}|{PATH_OF_OURS}) +\S.*")
# In help a sentence follows after two spaces, or after the backquote that ends the command.
HELP = re.compile(rf"(?:^ *|: )`?((?:(?:python3?|torchrun) |{PATH_OF_OURS} )[^`]*?)(?:`|  +\S.*|$)")
COMMENT = re.compile(r"^# +((?:python3?|torchrun) .*)$", re.M)


@dataclass(frozen=True)
class Command:
    """A command of a page, on one line, for one shell (``bash`` is any POSIX shell)."""

    page: str
    text: str
    shell: str = "bash"

    def __str__(self) -> str:
        return f"{self.page}: {self.text}"


def all_commands() -> list[Command]:
    """Return every command, the same text of one page once."""
    found = [command for page in PAGES for command in of_page(page)]
    found += [command for file in HELPFUL for command in of_help(file)]
    found += [
        command for file in sorted(ROOT.glob("configs/**/*.yaml")) for command in of_yaml(file)
    ]
    return list(dict.fromkeys([*found, *of_makefile(ROOT / "Makefile")]))


def of_page(page: Path) -> Iterator[Command]:
    """Yield the lines of shell blocks, joined where one ends in a backslash, and inline ones."""
    name, text = str(page.relative_to(ROOT)), page.read_text()
    for language, block in FENCE.findall(text):
        if language in SHELLS:
            yield from (Command(name, line, _shell(language)) for line in lines(block))
    for span in SPAN.findall(FENCE.sub("", text)):
        if INLINE.fullmatch(span := " ".join(span.split())):
            yield Command(name, span)


def _shell(language: str) -> str:
    return "bash" if language == "sh" else language


def lines(block: str) -> list[str]:
    """Return a block's commands without comments; ``export`` goes before each that follows it."""
    found, exports = [], []
    for line in re.sub(r" *\\\n *", " ", block).splitlines():
        line = re.sub(r"(?:^|\s+)#(?:\s.*|!.*|SBATCH.*)?$", "", line).strip()
        if line.startswith("export ") or re.match(r"\w+=\S*\$\(", line):
            exports.append(line)
        elif line:
            found.append("; ".join([*exports, line]))
    return found


def of_help(file: Path) -> Iterator[Command]:
    """Yield the commands of a program's docstring, which is what ``--help`` prints."""
    name = str(file.relative_to(ROOT))
    text = re.sub(r" *\\\n *", " ", ast.get_docstring(ast.parse(file.read_text())) or "")
    for line in text.splitlines():
        if found := HELP.search(line.rstrip(".")):
            yield Command(name, found[1].strip())


def of_yaml(file: Path) -> Iterator[Command]:
    name = str(file.relative_to(ROOT))
    yield from (Command(name, text.strip()) for text in COMMENT.findall(file.read_text()))


def of_makefile(file: Path) -> Iterator[Command]:
    """Yield the Makefile's own use of the programs, and what it proposes to type next."""
    for line in file.read_text().splitlines():
        text = line.replace("$(BIN)/", "").replace("$(RUN)", "runs/<name>").strip("\t @")
        text = re.sub(r"^echo '\s*(.*)'$", r"\1", text)
        if re.match(rf"python {PATH_OF_OURS} ", text):
            yield Command("Makefile", text)
