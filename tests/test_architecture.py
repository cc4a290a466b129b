"""Who may import whom, from the syntax trees; and what the core needs to be installed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([ROOT / "train.py", *(path for part in ("pdn", "data", "scripts") for path in (ROOT / part).rglob("*.py"))])
OPTIONAL = ("triton", "fla", "wandb", "lm_eval")

# Folder or module, and the prefixes that it may not import. The most specific entry does not replace the others: all hold.
FORBIDDEN = {
    "pdn": ("data", "scripts", "train", "hydra", "omegaconf"),
    "data": ("pdn", "scripts", "train", "hydra", "omegaconf"),
    "pdn/errors.py": ("pdn", "torch"),
    "pdn/trainer.py": ("pdn.mixers",),
}
# Folder or module, and the only modules of the project that it may import
ALLOWED = {
    "pdn/ops": ("pdn.ops",),
    "pdn/layers.py": ("pdn.ops",),
    "pdn/mixers": ("pdn.ops", "pdn.mixers", "pdn.layers"),
    "pdn/model.py": ("pdn.mixers", "pdn.layers", "pdn.config", "pdn.ops"),
    "pdn/config.py": ("pdn.mixers", "data.config"),
    "pdn/parallel.py": ("pdn.config", "pdn.errors"),
    "data/config.py": (),
}
# Exceptions: module, and what it may import though its folder may not
EXEMPT = {
    "pdn/config.py": ("data.config",),
    "pdn/_hydra": ("hydra", "omegaconf"),
}


def imports(path: Path, *, lazy: bool = True) -> set[str]:
    """The absolute names of all modules that a file imports; without ``lazy``, only those that importing it imports."""
    tree = ast.parse(path.read_text())
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found = set()
    for node in _statements(tree, lazy):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def _statements(node: ast.AST, lazy: bool):
    for child in ast.iter_child_nodes(node):
        skipped = not lazy and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        if not skipped and not _for_type_checkers(child):
            yield child
            yield from _statements(child, lazy)


def _for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def under(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def belongs(path: Path, place: str) -> bool:
    relative = path.relative_to(ROOT)
    return relative == Path(place) or Path(place) in relative.parents


def violations(path: Path) -> list[str]:
    names = imports(path)
    exempt = tuple(name for place, given in EXEMPT.items() if belongs(path, place) for name in given)
    found = []
    for place, prefixes in FORBIDDEN.items():
        if belongs(path, place):
            found += [f"{place} may not import {name}" for name in names if under(name, prefixes) and not under(name, exempt)]
    for place, prefixes in ALLOWED.items():
        if belongs(path, place):
            ours = [name for name in names if under(name, ("pdn", "data", "scripts", "train"))]
            # ``from pdn import ops`` names both pdn and pdn.ops
            found += [f"{place} may not import {name}" for name in ours if name != "pdn" and not under(name, prefixes)]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_its_layer_may(path):
    assert violations(path) == []


PLAIN_OPS = [path for path in SOURCES if belongs(path, "pdn/ops") and not belongs(path, "pdn/ops/triton")]


@pytest.mark.parametrize("path", PLAIN_OPS, ids=lambda path: str(path.relative_to(ROOT)))
def test_ops_need_torch_only_until_a_kernel_is_called(path):
    outside = {name.partition(".")[0] for name in imports(path, lazy=False)} - {"pdn", "torch"}
    assert outside <= set(sys.stdlib_module_names)


def test_the_places_named_in_these_rules_exist():
    for place in [*FORBIDDEN, *ALLOWED, *EXEMPT]:
        assert (ROOT / place).exists(), place


def test_the_root_holds_what_the_architecture_names_and_nothing_else():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode != 0:
        pytest.skip("not a git checkout")
    folders = {"configs", "pdn", "data", "scripts", "tests", "docs", ".ci"}
    files = {"train.py", "Dockerfile", "README.md", "pyproject.toml", "constraints.txt", "Makefile", "LICENSE"}
    found = {line.partition("/")[0] for line in tracked.stdout.splitlines()}
    assert found <= folders | files | {".gitignore", ".dockerignore"}


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
import data
assert "torch" not in sys.modules
import pdn._hydra.launch
assert "torch" not in sys.modules and "hydra" not in sys.modules
import pdn.trainer, pdn._hydra.compose, pdn._hydra.parse, pdn._hydra.sweep
assert not set({OPTIONAL}) & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_launcher_stays_a_page():
    assert len((ROOT / "train.py").read_text().splitlines()) < 80
