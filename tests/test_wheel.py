"""The wheel alone trains: in a clean environment, beside a folder and a module called ``data``."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RUN = """
import pathlib, sys
import pdn
from pdn.config import config_root
home = pathlib.Path(pdn.__file__).parent
assert home.parent.name == "site-packages" and home.is_relative_to(sys.prefix), home
assert config_root() == home / "configs"
import data
assert data.MINE
"""


def run(command: list, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=kept | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    """Return the Python of an environment that holds the wheel, and all else but the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    building = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    run([sys.executable, *building, "--wheel-dir", folder, ROOT], cwd=folder)
    [wheel] = folder.glob("pdn-*.whl")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    site = Path(
        run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], cwd=folder
        ).stdout.strip()
    )
    # A path in a .pth file is searched, but its own .pth files, an editable pdn's, are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel],
        cwd=folder,
    )
    return python


def test_the_wheel_trains_and_validates_beside_a_folder_and_a_module_called_data(clean, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data.py").write_text("MINE = True\n")
    run([clean, "-c", RUN], cwd=tmp_path)
    words = [
        "model=pgdn_tiny",
        "data=text",
        "data.max_bytes=300000",
        "data.validation_fraction=0.3",
        "data.vocab_size=320",
    ]
    words += ["data.seq_len=48", "trainer.steps=2", "trainer.global_batch_size=2", "logger=none"]
    words += ["trainer.micro_batch_size=2", "schedule.warmup_steps=1", "eval.every=1", "name=r"]
    words += ["eval.max_samples=4", "eval.batch_size=2"]
    run([clean, "-m", "pdn.cli.train", *words], cwd=tmp_path, PDN_CACHE=str(tmp_path / "cache"))
    records = (tmp_path / "runs" / "r" / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in records]
    assert [record["step"] for record in found if "loss" in record] == [1, 2]
    assert [record["step"] for record in found if "validation/loss" in record] == [0, 1, 2]


def test_a_checkout_on_the_import_path_finds_its_configs(tmp_path):
    code = "from pdn.config import config_root; print(config_root())"
    done = run([sys.executable, "-c", code], cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert Path(done.stdout.strip()) == ROOT / "configs"


ANSWERS = """
import contextlib, io, runpy, sys
for script in sys.argv[1:]:
    sys.argv, out = [script, "--help"], io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        assert not end.code, (script, end.code)
    assert script.rpartition("/")[2] in out.getvalue(), script
"""


def test_each_command_answers_from_another_folder(tmp_path):
    scripts = sorted(path for part in ("data", "scripts") for path in (ROOT / part).glob("*.py"))
    assert len(scripts) > 10
    run([sys.executable, "-c", ANSWERS, *scripts], cwd=tmp_path, PYTHONPATH=str(ROOT))
