"""The house: who may import whom, from the syntax trees.

And what the core needs to be installed.
"""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARTS = ("pdn", "data", "scripts", "examples")
SOURCES = sorted(
    [ROOT / "train.py", *(path for part in PARTS for path in (ROOT / part).rglob("*.py"))]
)
PROGRAMS = sorted([ROOT / "train.py", *ROOT.glob("scripts/*.py"), *ROOT.glob("data/*.py")])
OPTIONAL = ("triton", "fla", "wandb", "lm_eval")

# A package imports from its own and from later rows only. Those of one row do not know each other.
ROWS = (
    ("train", "scripts", "data", "examples"),
    ("pdn",),  # the public API in pdn/__init__.py
    ("pdn.cli",),
    ("pdn.reports",),
    ("pdn.training",),
    ("pdn.evals",),
    ("pdn.hub",),
    ("pdn.inference",),
    ("pdn.checkpoint",),
    ("pdn.optim",),
    ("pdn.distributed", "pdn.logging"),
    ("pdn.certification", "pdn.models", "pdn.runs"),
    ("pdn.ops", "pdn.data"),
    ("pdn.store",),
    ("pdn.config", "pdn.verdicts"),
    ("pdn.errors", "pdn.wording"),
)
RANK = {place: number for number, row in enumerate(ROWS) for place in row}
# Folder or module, and the prefixes that it may not import, besides what the rows forbid
FORBIDDEN = {
    # tokenizers: a tokenizer.json opened in two places is cut in one and whole in the other
    "pdn": ("hydra", "omegaconf", "tokenizers"),
    "scripts": ("tokenizers",),
    "pdn/data": ("torchdata",),
    "pdn/training": ("pdn.models.mixers",),
}
EXEMPT = {
    "pdn/cli": ("hydra", "omegaconf"),
    "pdn/training/config.py": ("pdn.models.mixers",),
    "pdn/data/codec.py": ("tokenizers",),
    "pdn/data/tokenizer.py": ("tokenizers",),
}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in SOURCES}


@cache
def imports(path: Path, *, lazy: bool = True) -> frozenset[str]:
    """Return the names of all modules that a file imports, wherever in it, for types too.

    Without ``lazy``, only those that importing it imports.
    """
    package = path.relative_to(ROOT).parts[:-1]
    found = set()
    for node in _statements(ast.parse(path.read_text()), lazy):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{module}.{alias.name}"
                found.add(whole if whole in MODULES else module)
    return frozenset(found)


def _statements(node: ast.AST, lazy: bool):
    for child in ast.iter_child_nodes(node):
        function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        if lazy or not (function or _for_type_checkers(child)):
            yield child
            yield from _statements(child, lazy)


def _for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def under(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def belongs(path: Path, place: str) -> bool:
    relative = path.relative_to(ROOT)
    return relative == Path(place) or Path(place) in relative.parents


def place_of(module: str) -> str:
    """Return the row entry that a module of the project belongs to."""
    first, second, *_ = [*module.split("."), ""]
    return f"pdn.{second}" if first == "pdn" and second else first


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_downwards_only(path):
    here = place_of(module_of(path))
    ours = {place_of(name) for name in imports(path) if under(name, (*PARTS, "train"))} - {here}
    upwards = {there for there in ours if RANK[there] <= RANK[here]}
    assert not upwards, f"{here} may not import {', '.join(sorted(upwards))}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_keeps_away_from_what_its_package_may_not_know(path):
    exempt = tuple(
        name for place, names in EXEMPT.items() if belongs(path, place) for name in names
    )
    for place, prefixes in FORBIDDEN.items():
        if belongs(path, place):
            known = {name for name in imports(path) if under(name, prefixes)}
            assert not {name for name in known if not under(name, exempt)}


def test_no_module_imports_itself_by_way_of_others():
    """Count lazy imports and those for types too: a circle is two rooms that are one."""
    graph = {name: imports(path) & MODULES.keys() for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name in done:
            return
        # A package's own modules are not a way around it: importing one runs the package first.
        for other in graph[name]:
            visit(other, (*trail, name))
        done.add(name)

    for name in sorted(graph):
        visit(name, ())


PLAIN_OPS = [path for path in SOURCES if belongs(path, "pdn/ops") and "triton" not in path.parts]


@pytest.mark.parametrize("path", PLAIN_OPS, ids=lambda path: str(path.relative_to(ROOT)))
def test_ops_need_torch_only_until_a_kernel_is_called(path):
    outside = {name.partition(".")[0] for name in imports(path, lazy=False)} - {"pdn", "torch"}
    assert outside <= set(sys.stdlib_module_names)


def test_every_package_has_a_row_and_every_place_in_the_rules_exists():
    packages = {f"pdn.{path.name}" for path in (ROOT / "pdn").iterdir() if path.is_dir()}
    packages = {name for name in packages if not name.endswith("__pycache__")}
    assert packages <= RANK.keys()
    for place in [*FORBIDDEN, *EXEMPT]:
        assert (ROOT / place).exists(), place


def test_the_root_holds_what_the_architecture_names_and_nothing_else():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if tracked.returncode != 0:
        pytest.skip("not a git checkout")
    folders = {"configs", "pdn", "data", "scripts", "tests", "docs", "examples", ".ci", ".github"}
    files = {"train.py", "Dockerfile", "README.md", "pyproject.toml", "constraints.txt"}
    files |= {"Makefile", "LICENSE", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff"}
    found = {line.partition("/")[0] for line in tracked.stdout.splitlines()}
    assert found <= folders | files | {".gitignore", ".dockerignore"}


def test_no_script_bears_the_name_of_a_standard_or_installed_module():
    """Check names: Python puts a script's folder first on the import path.

    There it would shadow the module.
    """
    installed = set(sys.stdlib_module_names) | {"pdn", "torch", "datasets", "tokenizers", "wandb"}
    names = {path.stem for part in ("data", "scripts") for path in (ROOT / part).glob("*.py")}
    assert not names & installed


def test_the_trainer_and_the_command_line_import_without_optional_packages():
    script = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
import pdn
assert "torch" not in sys.modules
import pdn.data
assert "torch" not in sys.modules
import pdn.cli.launch
assert "torch" not in sys.modules and "hydra" not in sys.modules
import pdn.training.fit, pdn.cli.compose, pdn.cli.parse, pdn.cli.sweep
assert not set({OPTIONAL}) & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_launcher_stays_a_page():
    assert len((ROOT / "train.py").read_text().splitlines()) < 80


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_text_is_read_and_written_in_a_named_encoding(path):
    """Otherwise it is that of the locale, which differs between those who write and who read."""
    unnamed = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and not any(k.arg == "encoding" for k in node.keywords):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            places = {"read_text": 0, "write_text": 1, "open": 99}
            method = isinstance(node.func, ast.Attribute)
            if name in ("read_text", "write_text") and method and len(node.args) <= places[name]:
                unnamed.append(node.lineno)
            if name == "open" and not method and not _is_binary(node):
                unnamed.append(node.lineno)
    assert not unnamed, f"lines {unnamed} name no encoding"


def _is_binary(call: ast.Call) -> bool:
    mode = call.args[1] if len(call.args) > 1 else None
    return isinstance(mode, ast.Constant) and "b" in str(mode.value)


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_every_program_prepares_its_process_before_it_imports_anything_of_weight(path):
    """Threads, output and the tie to the launcher are set in one place, before torch."""
    names = [
        name
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import)
                     else [node.module or ""])
    ]  # fmt: skip
    first = next(name for name in names if under(name, ("pdn", "torch", "numpy", "matplotlib")))
    assert first in ("pdn.cli.process", "pdn.cli.options", "pdn.cli.train")
