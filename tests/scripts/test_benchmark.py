"""The benchmarks run from end to end on a CPU and write what they promise."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.children import PYTHON_PATH

ROOT = Path(__file__).parents[2]


def benchmark(arguments: str, out: Path, sizes: str = "--heads 2 --key 16") -> str:
    options = [*sizes.split(), "--device", "cpu", "--out", str(out)]
    command = [sys.executable, str(ROOT / "scripts/benchmark.py"), *arguments.split(), *options]
    environment = os.environ | {"PYTHONPATH": PYTHON_PATH}
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_ops_gives_a_table_a_record_and_errors(tmp_path):
    options = (
        "--models pgdn sdpa --backends chunkwise reference --shapes 1x32 2x16 --steps 1 --dtype "
        "float32"
    )
    table = benchmark(f"ops {options}", tmp_path)
    assert table.count("| pgdn | 2x16 | chunkwise |") == 2  # as measured, and in the table
    records = json.loads((tmp_path / "ops.json").read_text())["records"]
    assert [(r["model"], r["shape"], r["backend"]) for r in records] == [
        ("pgdn", "1x32", "chunkwise"), ("pgdn", "1x32", "reference"), ("pgdn", "2x16", "chunkwise"),
        ("pgdn", "2x16", "reference"), ("sdpa", "1x32", "sdpa"), ("sdpa", "2x16", "sdpa"),
    ]  # fmt: skip
    assert all(r["wall_ms"] > 0 for r in records)
    assert records[0]["errors"]["o"] < 1e-5 and "dmu" in records[0]["errors"]


def test_a_backend_that_fails_is_a_row_and_the_rest_is_measured(tmp_path):
    table = benchmark("ops --models gdn --backends fla chunkwise --shapes 1x32 --steps 1", tmp_path)
    assert "failed: ValueError" in table
    assert "failed" not in json.loads((tmp_path / "ops.json").read_text())["records"][1]


def test_a_rival_is_timed_on_its_models_only_and_a_missing_package_is_said(tmp_path):
    backends = "chunkwise flash_qla cudnn"
    options = f"--models gdn kda pgdn --backends {backends} --shapes 1x32 --steps 1 --no-errors"
    benchmark(f"ops {options}", tmp_path)
    records = json.loads((tmp_path / "ops.json").read_text())["records"]
    rivals = {
        (r["model"], r["backend"]): r["failed"] for r in records if r["backend"] != "chunkwise"
    }
    assert rivals.keys() == {("gdn", "flash_qla"), ("kda", "cudnn")}
    assert "flash_qla needs the package flash_qla" in rivals["gdn", "flash_qla"]


def test_decode_gives_a_table_and_a_record(tmp_path):
    table = benchmark("decode --models pkda --backends reference --batches 1 2 --steps 1", tmp_path)
    assert table.count("| pkda | 2 | reference |") == 2
    assert len(json.loads((tmp_path / "decode.json").read_text())["records"]) == 2


def test_convolution_gives_a_table_and_a_record(tmp_path):
    table = benchmark(
        "convolution --backends torch --shapes 2x64 1x2000 --steps 1", tmp_path, "--channels 16"
    )
    assert table.count("| 1x2000 | 4 | torch |") == 2
    records = json.loads((tmp_path / "convolution.json").read_text())["records"]
    assert [(r["shape"], r["documents"]) for r in records] == [
        ("2x64", 0),
        ("2x64", 2),
        ("1x2000", 0),
        ("1x2000", 4),
    ]
    assert all(r["wall_ms"] > 0 and r["dx"] < 5e-3 for r in records)
