"""Tasks whose data come from a hub on loopback, by the real clients, from end to end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.children import PYTHON_PATH
from tests.data.local_hub import LocalHub
from tests.evals.hub_data import write_hub_data
from tests.small_runs import train

ROOT = Path(__file__).parents[2]
TASKS = "sciq", "arc_easy", "piqa"


@pytest.fixture
def hub(tmp_path):
    served = LocalHub(tmp_path / "served")
    write_hub_data(served.root / "datasets")
    yield served
    served.close()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("trained")
    train(home, "gdn_tiny", "trainer.steps=2", "schedule.warmup_steps=1")
    return home / "run"


def evaluate(hub: LocalHub, run: Path, home: Path, out: str) -> tuple[int, str, dict]:
    """Evaluate in another process; return its exit code, its output and the results."""
    words = [f"run={run}", f"tasks={','.join(TASKS)}", f"out={home / out}", "device=cpu"]
    env = hub.environment(home / "hf") | {"PYTHONPATH": PYTHON_PATH, "OMP_NUM_THREADS": "1"}
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRITON_INTERPRET"):
        env.pop(name, None)
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "evaluate.py"), *words],
        env=env, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    found = json.loads((home / out).read_text()) if (home / out).exists() else {}
    return done.returncode, done.stdout + done.stderr, found


@pytest.mark.slow
def test_tasks_are_fetched_once_and_one_that_is_not_to_be_had_does_not_keep_the_others(
    hub, trained, tmp_path
):
    hub.gone.add("baber/piqa")
    hub.failing["allenai/sciq"] = [503]
    code, said, first = evaluate(hub, trained, tmp_path, "first.json")
    assert code == 74 and "Traceback" not in said, said
    assert said.count("pdn[E-") == 1 and "piqa: its data set baber/piqa cannot be loaded" in said
    assert {row["task"] for row in first["results"]} == {"sciq", "arc_easy"}
    assert hub.failing["allenai/sciq"] == []  # it was asked again
    hub.gone.clear()
    hub.requests.clear()
    code, said, whole = evaluate(hub, trained, tmp_path, "whole.json")
    assert code == 0 and {row["task"] for row in whole["results"]} == set(TASKS), said
    files = [path for way, path in hub.requests if way == "GET" and path.endswith(".jsonl")]
    assert files and all("/baber/piqa/" in file for file in files)  # the others are cached
    hub.close()
    code, said, cached = evaluate(hub, trained, tmp_path, "cached.json")
    assert code == 0 and "the hub cannot be reached" in said, said
    assert cached["results"] == whole["results"]
