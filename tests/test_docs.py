"""What the documents point at is there: links, files, and names in the code."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from pdn.wording import counted, first_line

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("data/*.md")])
PAGES += sorted(ROOT.glob("examples/*.md"))
SOURCES = sorted(
    path for part in ("pdn", "data", "scripts") for path in (ROOT / part).rglob("*.py")
)
COUNT = re.compile(r"(?<!of )\{[^{}]*\} (?:files|documents|shards|steps|checkpoints)(?![/\w])")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PLACE = re.compile(r"`((?:pdn|configs|data|scripts|docs|tests|examples)/[\w./-]*\w)`")
NAME = re.compile(r"`(pdn(?:\.\w+)+)(?:\(.*?\))?`")


@cache
def names_of(path: Path) -> frozenset[str]:
    """Return the names at the top of a module, and ``Class.member`` of its classes."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
    if path == ROOT / "pdn" / "__init__.py":  # its public names load on first use
        tree = ast.parse(path.read_text())
        found |= {
            n.value
            for n in ast.walk(tree)
            if isinstance(n, ast.Constant) and isinstance(n.value, str)
        }
    return frozenset(found)


def exists(name: str) -> bool:
    """Return whether a dotted name is a module of the project, or something in one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:end])
        module = (
            place.with_suffix(".py")
            if place.with_suffix(".py").is_file()
            else place / "__init__.py"
        )
        if module.is_file():
            return all(part in names_of(module) for part in parts[end:])
    return False


@cache
def anchors(page: Path) -> frozenset[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ +(.+)$", page.read_text(), re.M)
    plain = (re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads)
    return frozenset(plain)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    broken = []
    for target in LINK.findall(page.read_text()):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        if not there.exists() or (anchor and anchor not in anchors(there)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_and_names_that_a_page_mentions_exist(page):
    text = page.read_text()
    places = [place for place in PLACE.findall(text) if "mine" not in place]  # a reader's own
    missing = [place for place in places if not (ROOT / place).exists()]
    missing += [name for name in NAME.findall(text) if not exists(name)]
    assert not missing


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_that_a_docstring_mentions_exist(path):
    assert not [name for name in NAME.findall(path.read_text()) if not exists(name)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_one_file_is_not_called_one_files(path):
    """Counts that can be 1 go through ``pdn.wording.counted``."""
    found = [m for m in COUNT.findall(path.read_text()) if "STEPS" not in m]
    assert not found or path.parent.name == "benchmarks"


def test_an_error_that_says_nothing_has_a_first_line():
    """A line of an error's text goes through ``pdn.wording.first_line``."""
    assert not [path for path in SOURCES if "str(error).splitlines()[0]" in path.read_text()]


def test_an_error_that_says_nothing_is_called_by_its_kind():
    assert [first_line(e) for e in (ValueError("\na\nb"), AssertionError(), OSError(" "))] == [
        "a", "AssertionError", "OSError"
    ]  # fmt: skip


def test_a_number_and_what_it_counts_agree():
    assert [counted(n, "entry") for n in (0, 1, 2000)] == ["0 entries", "1 entry", "2,000 entries"]
    assert [counted(2, n) for n in ("batch", "day", "file")] == ["2 batches", "2 days", "2 files"]
