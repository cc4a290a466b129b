"""The image's files, and what neither git nor the image may take: checked without Docker."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pdn.runs.launches import _git

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("scripts/*.py"))]
SHOWN = re.compile(r"(?:\bout=|--out |\bto=)([a-z][\w-]*(?:/[\w.<>-]+|\.\w+))")
DEFAULT = re.compile(r"^    out: str = (?:Field\()?\"([\w.]+)\"", re.M)
MADE = {"runs/x", "cache/x", "wandb/x", ".env"}
MADE |= {name for page in PAGES for name in SHOWN.findall(page.read_text())}
MADE |= {name for page in PAGES for name in DEFAULT.findall(page.read_text())}


def copied() -> list[list[str]]:
    """Return sources and target of each COPY from the checkout."""
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    return [line.split()[1:] for line in lines if line.startswith("COPY") and "--from" not in line]


def test_what_the_image_copies_is_there():
    sources = [source for *words, _ in copied() for source in words]
    assert len(sources) > 3
    assert [source for source in sources if not (ROOT / source).exists()] == []


def test_the_files_of_the_stage_of_dependencies_suffice_to_install_them(tmp_path):
    for *sources, target in copied()[:-1]:
        for source in sources:
            place = (
                tmp_path / target / Path(source).name if target.endswith("/") else tmp_path / target
            )
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / source, place)
    made = re.search(r"mkdir -p (.*?) &&", (ROOT / "Dockerfile").read_text())[1]
    for folder in made.split():
        (tmp_path / folder).mkdir(parents=True)
    words = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", "wheels", "."]
    subprocess.run([sys.executable, "-m", "pip", *words], cwd=tmp_path, check=True)
    assert list((tmp_path / "wheels").glob("pdn-*.whl"))


def test_no_code_needs_the_metadata_of_pdn_which_the_image_has_not():
    assert "uninstall -y pdn" in (ROOT / "Dockerfile").read_text()
    asks = re.compile(r"version\([\"']pdn|version\(package\).*[\"']pdn[\"']")
    files = [
        ROOT / "train.py",
        *(f for part in ("pdn", "scripts") for f in ROOT.glob(f"{part}/**/*.py")),
    ]
    assert [str(file) for file in files if asks.search(file.read_text())] == []


def test_a_run_without_a_repository_records_the_commit_that_the_image_was_built_from(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("PDN_COMMIT", "c0ffee")
    assert _git(tmp_path) == {"commit": "c0ffee", "changed": None}
    monkeypatch.setenv("PDN_COMMIT", "")  # built without the argument
    assert _git(tmp_path) is None


@pytest.mark.parametrize("path", sorted(MADE))
def test_what_the_documents_tell_people_to_make_enters_neither_git_nor_the_image(path):
    if not (ROOT / ".git").exists():
        pytest.skip("needs the repository")
    found = subprocess.run(["git", "check-ignore", "--quiet", path], cwd=ROOT)
    assert found.returncode == 0
    first = path.partition("/")[0]
    patterns = (ROOT / ".dockerignore").read_text().split()
    assert any(
        re.fullmatch(p.lstrip("/").replace(".", r"\.").replace("*", ".*"), first) for p in patterns
    )
