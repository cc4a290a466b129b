"""The paper's run, with a small model, on a hub on loopback: the real clients, from end to end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pdn.data.corpora import corpus
from tests.children import PYTHON_PATH
from tests.data.corpus import documents, tokenizer
from tests.data.local_hub import LocalHub
from tests.presets import SMALL
from tests.small_runs import losses, metrics

ROOT = Path(__file__).parents[2]
WORDS = [
    "experiment=pgdn_340m",
    "model.num_layers=2",
    *(word for word in SMALL if "vocab_size" not in word),
    "data.seq_len=32",
    "data.shard_tokens=512",
    "data.block_shards=2",
    "data.processes=1",
    "data.validation_documents=64",
    "trainer.device=cpu",
    "trainer.steps=8",
    "trainer.global_batch_size=8",
    "trainer.micro_batch_size=8",
    "schedule.warmup_steps=2",
    "checkpoint.every=2",
    "checkpoint.asynchronous=false",
    "eval=none",
    "logger=none",
    "name=run",
]
SLIMPAJAMA = corpus("slimpajama")
FIRST, MIRROR = (place.dataset for place in SLIMPAJAMA.places)


@pytest.fixture
def hub(tmp_path):
    served = LocalHub(tmp_path / "served")
    served.revisions |= {place.revision for place in SLIMPAJAMA.places if place.revision}
    for name in (FIRST, MIRROR):
        for number in range(3):
            lines = [json.dumps({"text": text}) for text in documents(150, seed=number)]
            content = "".join(f"{line}\n" for line in lines).encode()
            served.add("datasets", name, f"data/train-{number:05d}.jsonl", content)
    words = tokenizer().content.decode().replace("<|endoftext|>", SLIMPAJAMA.eos_token)
    served.add("models", SLIMPAJAMA.tokenizer, "tokenizer.json", words.encode())
    yield served
    served.close()


def start(hub: LocalHub, home: Path, **environment: str) -> subprocess.Popen:
    """Start train.py in ``home``, with caches of its own."""
    own = {"PYTHONPATH": PYTHON_PATH, "OMP_NUM_THREADS": "1", "PDN_CACHE": str(home / "cache")}
    env = hub.environment(home / "hf") | own | environment
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(ROOT / "train.py"), *WORDS, f"output_dir={home}"]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def ended(child: subprocess.Popen) -> tuple[int, str]:
    """Return the exit code and the output of a launch."""
    try:
        said, _ = child.communicate(timeout=900)
    finally:
        child.kill()
    return child.returncode, said


def ledger(home: Path) -> str:
    return (home / "run" / "ledger.jsonl").read_text()


@pytest.mark.slow
def test_the_run_of_the_paper_streams_is_killed_and_stays_at_the_mirror_it_began_with(
    hub, tmp_path
):
    hub.gone.add(FIRST)
    hub.statuses[FIRST] = 404
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    begun = start(hub, whole), start(hub, killed, PDN_FAULT="kill@5:0")
    (code, said), (code_of_killed, said_by_killed) = [ended(child) for child in begun]
    assert code == 0 and f"{FIRST}: found no such dataset on the hub" in said, said
    assert code_of_killed == -9 and '"step": 5,' in ledger(killed), said_by_killed
    hub.gone.clear()  # the first place is there again, and is not gone back to
    hub.requests.clear()
    code, said = ended(start(hub, killed))
    assert code == 0 and "continuing from step 4" in said, said
    assert not any(FIRST in path for _, path in hub.requests)
    assert losses(metrics(killed)) == losses(metrics(whole))
    assert ledger(killed) == ledger(whole)


REFUSALS = {
    "gone": (404, 65, "found no such dataset on the hub, or a private one; expected one that may"),
    "gated-401": (401, 65, "gated; expected an account that may read it: accept its terms at"),
    "gated-403": (403, 65, "gated; expected an account that may read it: accept its terms at"),
    "unreachable": (0, 74, "expected its answer"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", REFUSALS)
def test_the_run_of_the_paper_says_what_it_cannot_have(fault, hub, tmp_path):
    status, expected, words = REFUSALS[fault]
    for name in (FIRST, MIRROR):
        (hub.gone if fault == "gone" else hub.gated).add(name)
        hub.statuses[name] = status
    if fault == "unreachable":
        hub.close()
    code, said = ended(start(hub, tmp_path))
    assert (code, words in said) == (expected, True), said
    assert said.count("pdn[E-") == 1 and "Traceback" not in said, said
    assert "data=stream_local" in said and "data=text" in said
    # What may be there at the next try is not the command's fault: the status tells it.
    assert (tmp_path / "run" / "status.json").exists() == (fault == "unreachable")
