"""The kernels take the registers, stack and shared memory that docs/kernel_resources.md says.

Where a change is meant, ``python scripts/benchmark.py registers --write`` makes the table anew.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from tests.children import PYTHON_PATH

ROOT = Path(__file__).parents[2]
TABLE = (ROOT / "docs/kernel_resources.md").read_text()

pytestmark = pytest.mark.skipif(
    triton.__version__ not in TABLE, reason="the table is another Triton's"
)


def rows(text: str) -> list[list[str]]:
    """Return a table's rows below its header, without the number of instructions.

    That number says little.
    """
    lines = [
        [x.strip() for x in line.split("|")[1:-2]] for line in text.splitlines() if "|" in line
    ]
    return lines[2:]


def compiled(*options: str) -> list[list[str]]:
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = PYTHON_PATH
    command = [sys.executable, str(ROOT / "scripts/benchmark.py"), "registers", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    return rows(done.stdout)


def test_two_kernels_take_what_the_table_says():
    found = compiled(
        "--models", "pgdn", "--capabilities", "90", "--kernels", "rescale_kernel", "sum_kernel"
    )  # fmt: skip
    assert found == [row for row in rows(TABLE) if row[:3] == ["pgdn", "rescale_kernel", "90"]]
    assert found


@pytest.mark.slow
def test_every_kernel_takes_what_the_table_says():
    assert compiled() == rows(TABLE)


def test_the_launch_table_names_every_kernel_of_the_table():
    named = (ROOT / "docs/kernels.md").read_text()
    kernels = {row[1].removesuffix("_kernel").replace("_", " ") for row in rows(TABLE)}
    launches = named[named.index("## Launches") : named.index("No atomics")].replace("_", " ")
    missing = {kernel for kernel in kernels if not re.search(rf"\b{kernel}\b", launches)}
    assert missing <= {"sum"}
