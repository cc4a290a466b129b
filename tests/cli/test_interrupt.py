"""Ctrl-C before a program has come to what handles it: one line and 130, whatever is imported."""

import os
import runpy
import signal
import subprocess
import sys

import pytest

from pdn.cli import launch, options, process
from pdn.cli.compose import CONFIGS
from tests.children import PYTHON_PATH

ROOT = CONFIGS.parent
HEAVY = "hydra", "numpy", "pydantic", "rich", "torch"
# The error is what some libraries make of an interrupt in the middle of them.
PRESSED = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    raise ImportError("half made")
"""


def interrupted(tmp_path, *words: str) -> tuple[int, str]:
    """Run Python, have Ctrl-C come with the first import of weight; code and error output."""
    for name in HEAVY:
        (tmp_path / f"{name}.py").write_text(PRESSED)
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{PYTHON_PATH}"},
        capture_output=True,
        text=True,
        # a shell starts what runs in its background with Ctrl-C ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("train.py", "data=text"),
        ("-m", "pdn.cli.train", "data=text"),
        ("scripts/generate.py", "run=runs/a"),
        ("scripts/plot.py", "runs/a"),
        ("scripts/benchmark.py", "train"),
        ("data/prepare.py", "--path", "text"),
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_ctrl_c_while_a_program_imports_is_one_line(tmp_path, words):
    assert interrupted(tmp_path, *words) == (130, "interrupted\n")


def test_ctrl_c_in_what_imports_a_part_of_it_is_its_own(tmp_path):
    code, said = interrupted(tmp_path, "-c", "import pdn.cli.options")
    assert code == 1 and said.endswith("ImportError: half made\n")


def test_ctrl_c_that_is_ignored_remains_so(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        f"__file__ = {str(ROOT / 'train.py')!r}\nimport pdn.cli.process\n"
        "print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)\n"
    )
    env = os.environ | {"PYTHONPATH": PYTHON_PATH}
    done = subprocess.run([sys.executable, program], env=env, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


@pytest.fixture
def importing(monkeypatch):
    """Have Ctrl-C end this process at once, as while a program imports."""
    before = signal.signal(signal.SIGINT, process._end_at_once)
    yield
    signal.signal(signal.SIGINT, before)


def where_hydra_takes_over(monkeypatch) -> None:
    monkeypatch.setattr("hydra.main", lambda **_: lambda task: lambda: None)
    launch.main(["--cfg", "job"], lambda config: None)


def in_a_script(monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["script.py", "x=1"])
    options.run_script(lambda words: None)


@pytest.mark.parametrize("begin", [where_hydra_takes_over, in_a_script])
def test_a_program_that_has_begun_handles_ctrl_c_itself(importing, monkeypatch, begin):
    begin(monkeypatch)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_preparation_that_has_begun_handles_ctrl_c_itself(importing):
    prepare = runpy.run_path(str(ROOT / "data/prepare.py"))["main"]
    with pytest.raises(SystemExit):
        prepare(["--help"])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
