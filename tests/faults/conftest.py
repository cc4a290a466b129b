"""Fixtures of the fault tests, and the table that they fill.

``pytest tests/faults`` runs a few trials of the most telling faults. ``make faults`` runs all of
them and writes the table into ``docs/reliability.md``.
"""

import contextlib
import os
import platform
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.faults import rig

BEGIN, END = "<!-- begin: measured by make faults -->", "<!-- end -->"
BEGAN, PROPERTY = pytest.StashKey[float](), "fault table row"


@dataclass
class Row:
    """One line of the table.

    ``trials`` counts what was tried, all of it as expected unless ``failed``.
    """

    number: str
    fault: str
    expected: str
    seed: int | None = None
    trials: int = 0
    failed: str = ""
    note: str = ""

    def bound(self) -> str:
        """Return the upper 95 % bound on the probability of another outcome.

        It is the exact binomial one after no other outcome in ``trials``.
        """
        return (
            "—"
            if self.failed or not self.trials
            else f"≤ {100 * (1 - 0.05 ** (1 / self.trials)):.2g} %"
        )

    def line(self) -> str:
        outcome = f"FAILED: {self.failed}" if self.failed else f"{self.trials} of {self.trials}"
        seed = "" if self.seed is None else str(self.seed)
        return (
            f"| {self.number} | {self.fault} | {self.expected} | {outcome} | {self.bound()} | "
            f"{seed} | {self.note} |"
        )


def pytest_configure(config: pytest.Config) -> None:
    ROWS.clear()
    config.stash[BEGAN] = time.monotonic()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Collect the rows of a test, also of one that another process of pytest-xdist ran."""
    if report.when == "call":
        ROWS.extend(Row(**row) for name, row in report.user_properties if name == PROPERTY)


ROWS: list[Row] = []


@pytest.fixture
def table(request):
    """Let ``with table(number, fault, expected, seed) as row:`` add a row.

    An exception inside marks it as failed.
    """

    @contextlib.contextmanager
    def add(number: str, fault: str, expected: str, seed: int | None = None) -> Iterator[Row]:
        row = Row(number, fault, expected, seed)
        try:
            yield row
        except BaseException as error:
            row.failed = f"trial {row.trials + 1}: {type(error).__name__}"
            raise
        finally:
            request.node.user_properties.append((PROPERTY, asdict(row)))

    return add


def pytest_terminal_summary(terminalreporter, exitstatus, config) -> None:
    # A process of pytest-xdist has some of the rows only.
    if not ROWS or hasattr(config, "workerinput"):
        return
    rows = sorted(ROWS, key=lambda row: [int(part) for part in row.number.split("–")[0].split(".")])
    head = (
        "| # | fault | expected | as expected | other outcomes (95 %) | seed | "
        "|\n|---|---|---|---|---|---|---|"
    )
    text = "\n".join([head, *(row.line() for row in rows)])
    terminalreporter.write_line("\n" + text)
    target = os.environ.get("PDN_FAULT_TABLE")
    if target:
        machine = (
            f"{os.cpu_count()} CPU cores, Python {platform.python_version()}, torch "
            f"{torch.__version__}"
        )
        minutes = (time.monotonic() - config.stash[BEGAN]) / 60
        load = (
            f"which have had a load of {os.getloadavg()[2]:.1f} over the last 15 minutes: its "
            "times are upper bounds"
        )
        _write(Path(target), f"{text}\n\nOne pass of {minutes:.0f} minutes on {machine}, {load}.")


def _write(file: Path, text: str) -> None:
    before, _, rest = file.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    file.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def amount(fast: int | None, full: int):
    """Parametrise ``trials``: a few in every run of the suite, all of them with ``-m slow``.

    A ``fast`` of None means none in every run.
    """
    values = [pytest.param(full, marks=pytest.mark.slow, id="full")]
    if fast is not None:
        values.insert(0, pytest.param(fast, id="fast"))
    return pytest.mark.parametrize("trials", values)


@pytest.fixture
def in_memory(tmp_path):
    """Return a directory on a memory file system, where there is one, for what no disk matters to.

    Thousands of small files are synced there at no cost.
    """
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    directory = Path(tempfile.mkdtemp(prefix="pdn-faults-", dir=memory))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """Holds the corpus and the cache of its tokens."""
    directory = tmp_path_factory.mktemp("faults")
    rig.write_corpus(directory / "corpus")
    return directory


@pytest.fixture(scope="session")
def reference(base):
    """Return ``reference(world_size, *overrides)``: the record of the uninterrupted run."""

    @cache
    def run(world_size: int, *more: str, length: int = rig.STEPS) -> rig.Record:
        directory = base / f"reference-{world_size}-{zlib.crc32(' '.join(more).encode()):08x}"
        started = rig.launch(directory, world_size, rig.overrides(directory, base, *more))
        assert started.wait() == [0] * world_size, started.text()
        return rig.record(directory, length)

    return run
