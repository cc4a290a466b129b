"""The bounds of pyproject.toml are versions that were tried, and not hopes."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Those of users; what developers need has the versions of constraints.txt.
FOR_USERS = PROJECT["dependencies"] + [
    line
    for name in ("fla", "evals", "plots", "search", "tensorboard", "s3")
    for line in EXTRAS[name]
]


def pinned(file: str) -> dict[str, Version]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {name.lower().replace("_", "-"): Version(version) for name, version in pairs}


@pytest.mark.parametrize("line", FOR_USERS)
def test_a_lower_bound_is_the_lowest_version_that_was_tried(line):
    wanted = Requirement(line)
    lowest, highest = pinned(".ci/lowest.txt"), pinned("constraints.txt")
    bounds = [Version(one.version) for one in wanted.specifier if one.operator in (">=", "==")]
    assert bounds == [lowest[wanted.name]]
    assert wanted.name not in highest or highest[wanted.name] in wanted.specifier


def test_every_version_that_was_tried_is_a_bound():
    names = {Requirement(line).name for line in FOR_USERS}
    assert names == pinned(".ci/lowest.txt").keys()
