"""Corpora on a hub that speaks HTTP on loopback.

The real clients run, in processes of their own.
"""

import io
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import show
from pdn.data.hub import hub as open_hub
from pdn.data.row import BadRow
from tests.children import PYTHON_PATH
from tests.data.corpus import LOADING, STREAM, documents, tokenizer
from tests.data.local_hub import COMMIT, LocalHub

ROOT = Path(__file__).parents[2]
TEXTS = [documents(150, seed=seed) for seed in range(3)]
OPEN = """
import json, sys
from pydantic import TypeAdapter
from pdn.data import corpora, open_data
from pdn.data.config import DataConfig
from pdn.errors import PdnError
keys, entries, recorded, batches = json.loads(sys.argv[1])
for entry in entries:
    corpora.corpus = lambda name: corpora.Corpus.model_validate(entry)
    said = []
    try:
        data = open_data(TypeAdapter(DataConfig).validate_python(keys), global_batch_size=8, seed=0,
                         progress=said.append, recorded=recorded)
        digests, state = [], 0
        steps = data.steps(0, micro_batch_size=8, stop_sample=None)
        for _ in range(batches):
            step, state = next(steps)
            digests += step["sample_digests"].flatten().tolist()
        print(json.dumps({"fingerprint": data.fingerprint, "digests": digests, "said": said}))
        data.close()
    except PdnError as error:
        print(json.dumps({"error": str(error), "code": error.exit_code, "said": said}))
"""


@pytest.fixture
def hub(tmp_path):
    served = LocalHub(tmp_path / "served")
    for name in ("first/set", "second/set"):
        for number, texts in enumerate(TEXTS):
            lines = [json.dumps({"text": t, "meta": None if number else {"n": 1}}) for t in texts]
            content = "".join(f"{line}\n" for line in lines).encode()
            served.add("datasets", name, f"data/train-{number:05d}.jsonl", content)
    served.add("models", "some/tokenizer", "tokenizer.json", tokenizer().content)
    yield served
    served.close()


def entry(first: str | None = None, **keys) -> dict:
    return {
        "dataset": "first/set",
        "revision": first,
        "mirrors": [{"dataset": "second/set", "revision": None}],
        "dataset_config": None,
        "split": "train",
        "text_field": "text",
        "tokenizer": "some/tokenizer",
        "tokenizer_revision": None,
        "eos_token": None,
        "license": "none",
        "size": "small",
        **keys,
    }


def start(hub: LocalHub, home: Path, recorded=None, batches: int = 6, **keys) -> dict:
    """Open the corpus in a process of its own; what it read, or why not."""
    return start_all(hub, home, [entry(**keys)], recorded, batches)[0]


def start_all(
    hub: LocalHub, home: Path, entries: list[dict], recorded=None, batches: int = 6
) -> list[dict]:
    """Open several corpora in one process, one after the other."""
    open_keys = {"corpus": "test", "split": None, "text_field": None, "tokenizer": None}
    patience = {"retry_seconds": 100.0, "stall_seconds": 60.0, "timeout_seconds": 120.0}
    config = {**LOADING, **STREAM, **open_keys, **patience, "cache_dir": str(home / "cache")}
    arguments = json.dumps([config, entries, recorded, batches])
    env = hub.environment(home / "hf") | {"PYTHONPATH": PYTHON_PATH, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", OPEN, arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=600,  # on a machine that does other work as well
    )
    assert done.stdout, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == len(entries), done.stdout + done.stderr[-2000:]
    return found


def test_a_corpus_streams_by_its_name_and_its_commit_is_remembered(hub, tmp_path):
    first = start(hub, tmp_path)
    assert "fingerprint" in first, first
    assert first["fingerprint"]["data.source"] == "first/set"
    assert first["fingerprint"]["data.revision"] == COMMIT
    hub.requests.clear()
    again = start(hub, tmp_path)
    assert again["digests"] == first["digests"] and again["fingerprint"] == first["fingerprint"]
    assert not any("revision/main" in path for _, path in hub.requests)


def test_a_gated_corpus_falls_back_to_its_mirror_and_a_run_stays_there(hub, tmp_path):
    hub.gated.add("first/set")
    first = start(hub, tmp_path)
    assert first.get("fingerprint", first)["data.source"] == "second/set"
    assert any("first/set" in line and "gated" in line for line in first["said"])
    hub.gated.clear()
    elsewhere = start(hub, tmp_path / "other", recorded=first["fingerprint"])
    assert elsewhere["fingerprint"] == first["fingerprint"]
    assert elsewhere["digests"] == first["digests"]


@pytest.mark.slow
def test_a_hub_with_hiccups_gives_the_same_stream(hub, tmp_path):
    hub.failing["first/set"] = [503, 429]
    hub.cut["first/set"] = 2
    flaky = start(hub, tmp_path / "flaky")
    assert flaky.get("digests") == start(hub, tmp_path / "calm")["digests"], flaky


ACCEPT = "expected an account that may read it: accept its terms at https://huggingface.co/"
READABLE = "found no such dataset on the hub, or a private one; expected one that may be read"
REFUSED = {  # of a dataset or a tokenizer: the hub's status, our exit code, what is said
    "gone-401/set": (401, 65, f"E-HUB-GONE] gone-401/set: {READABLE}"),
    "gone-404/set": (404, 65, f"E-HUB-GONE] gone-404/set: {READABLE}"),
    "gated-401/set": (401, 65, f"gated; {ACCEPT}datasets/gated-401/set and set HF_TOKEN"),
    "gated-403/set": (403, 65, f"gated; {ACCEPT}datasets/gated-403/set and set HF_TOKEN"),
    "column/set": (200, 65, "no field 'body'; found ['meta', 'text']; set data.text_field"),
    "tales/set": (200, 65, "no column 'text'; found ['about', 'body', 'id']; set data.text_field"),
    "gone-404/tokenizer": (404, 65, "E-TOKENIZER-MISSING] gone-404/tokenizer: found neither a lo"),
    "gated-403/tokenizer": (403, 65, f"gated-403/tokenizer: gated; {ACCEPT}gated-403/tokenizer"),
    "first/set@gone": (200, 65, "E-HUB-REVISION] first/set@gone: the hub has this dataset, but"),
    "some/tokenizer@gone": (200, 65, "E-TOKENIZER-MISSING] some/tokenizer@gone: the hub has this"),
}


def test_what_is_not_to_be_had_is_said_with_what_helps(hub, tmp_path):
    file = io.BytesIO()
    nested = [{"words": 3, "tags": ["sea"]}]
    pq.write_table(pa.table({"body": TEXTS[0][:1], "about": nested, "id": [1]}), file)
    hub.add("datasets", "tales/set", "data/train-0.parquet", file.getvalue())
    entries = []
    for key, (status, *_) in REFUSED.items():
        name, _, revision = key.partition("@")
        kind = name.partition("/")[2]
        hub.statuses[name] = status
        if name.startswith("gated"):
            file = ("datasets", name, "train.jsonl") if kind == "set" else ("models", name, "x")
            hub.gated.add(name)
            hub.add(*file, b'{"text": "tide"}\n')
        wrong = {"dataset" if kind == "set" else "tokenizer": name}
        if revision:
            wrong["revision" if kind == "set" else "tokenizer_revision"] = revision
        if name == "column/set":
            wrong = {"text_field": "body"}
        entries.append(entry(mirrors=[], **wrong))
    hub.requests.clear()
    for (name, (_, code, words)), found in zip(
        REFUSED.items(), start_all(hub, tmp_path, entries), strict=True
    ):
        assert (found.get("code"), words in found.get("error", "")) == (code, True), found
        has_no_such_column = name in ("column/set", "tales/set")
        assert has_no_such_column or "data=text" in found["error"] or "token" in name
        assert "None" not in found["error"]
    # refused at once: nothing of this is asked again and again
    assert len(hub.requests) < 10 * len(REFUSED)


def test_a_hub_that_does_not_answer_is_said(hub, tmp_path):
    hub.close()
    found = start(hub, tmp_path, mirrors=[])
    assert found["code"] == 74 and "E-HUB-UNREACHABLE] first/set: the hub can" in found["error"]
    for words in ("expected its answer: check the network", "data=stream_local", "data=text"):
        assert words in found["error"]


@pytest.mark.slow
def test_every_place_that_cannot_be_read_is_named(hub, tmp_path):
    hub.gated.add("first/set")
    hub.gone.add("second/set")
    found = start(hub, tmp_path)
    assert found["code"] == 65 and "none of 2 places" in found["error"]
    assert "first/set" in found["error"] and "second/set" in found["error"]


def test_the_check_of_a_corpus_says_what_can_be_had(hub, tmp_path, capsys):
    name = "gmongaras/SlimPajama-627B_Reupload"
    hub.add("datasets", name, "data/train-0.jsonl", b'{"text": "tide"}\n')
    content = tokenizer().content.decode().replace("<|endoftext|>", "</s>").encode()
    hub.add("models", "fla-hub/transformer-1.3B-100B", "tokenizer.json", content)
    env = hub.environment(tmp_path / "hf") | {"PYTHONPATH": PYTHON_PATH, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "data" / "show.py"), "corpus=slimpajama", "--check"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{name}: reachable, at {COMMIT}" in done.stdout
    assert "cerebras/SlimPajama-627B: pdn[E-HUB-GONE]" in done.stdout
    assert "tokenizer fla-hub/transformer-1.3B-100B: 300 entries" in done.stdout
    with pytest.raises(SystemExit, match="2"):
        show.main(["corpus=slim", "--check"])
    assert "'slimpajama'" in capsys.readouterr().err


@pytest.mark.parametrize("value", [5, {"a": 1}])
def test_a_row_that_is_no_text_is_a_bad_row_and_leaves_the_others_as_they_are(value, tmp_path):
    rows = ["one", value, 'a "quoted" line\nand another']
    lines = "".join(json.dumps({"text": row, "other": 1}) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    with pytest.raises(BadRow, match=f"row 1 of this reading: 'text' is {type(value).__name__}"):
        read(tmp_path)
    assert read(tmp_path, skip_bad_rows=True) == ([rows[0], rows[2]], 1)


def test_a_column_that_turns_into_numbers_is_not_read_as_text(tmp_path):
    pq.write_table(pa.table({"text": ["one", None]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "b.parquet")
    with pytest.raises(BadRow, match="row 2 of this reading: 'text' is int, expected a string"):
        read(tmp_path)
    assert read(tmp_path, skip_bad_rows=True) == (["one"], 2)


def read(path: Path, *, skip_bad_rows: bool = False) -> tuple[list[str], int]:
    """Return the texts, and the number of bad rows, of a directory that `datasets` reads."""
    source = open_hub(str(path), None, None, "train", "text", skip_bad_rows=skip_bad_rows)
    batches = list(source.batches(None))
    return [t for b in batches for t in b.texts], sum(len(b.bad_rows) for b in batches)
