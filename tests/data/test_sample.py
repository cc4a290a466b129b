"""The sample of a corpus that a tokenizer is tried on comes from all of the corpus."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pdn.data import documents
from pdn.data.documents import SAMPLE_CHARACTERS, discover, sample

EARLY, LATE = "ship rain wind harbour", "снег лёд вьюга мороз"
ROWS = [EARLY] * 24000 + [LATE] * 12000


def write(folder, kind: str):
    path = folder / f"corpus{kind}"
    if kind == ".parquet":
        pq.write_table(pa.table({"text": ROWS}), path, row_group_size=500)
    elif kind == ".txt":
        path.write_text("\n".join(ROWS))
    else:
        lines = "".join(json.dumps({"text": row}) + "\n" for row in ROWS).encode()
        path.write_bytes(gzip.compress(lines) if kind == ".jsonl.gz" else lines)
    return discover(str(path), "text")


@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".jsonl.gz", ".parquet"])
def test_text_from_the_end_of_a_file_is_in_the_sample(kind, tmp_path):
    found = sample(write(tmp_path, kind))
    late = sum(len(text) for _, text in found if "снег" in text or "вьюга" in text)
    assert late > 0.15 * sum(len(text) for _, text in found)
    assert sum(len(text) for _, text in found) <= 1.1 * SAMPLE_CHARACTERS


@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".parquet"])
def test_a_large_file_is_sampled_in_several_places_without_reading_it_whole(
    kind, tmp_path, monkeypatch
):
    source = write(tmp_path, kind)
    monkeypatch.setattr(documents, "READ_WHOLE", 0)
    monkeypatch.setattr(documents, "SAMPLE_CHARACTERS", 20_000)
    found = sample(source)
    late = [place for place, text in found if "снег" in text]
    assert late and any("beyond" in place for place in late)
    assert sum(len(text) for _, text in found) < 40_000


def test_parts_of_a_long_document_are_cut_between_words(tmp_path):
    (tmp_path / "one.txt").write_text(" ".join(["harbour", "lighthouse"] * 40_000))
    words = {word for _, text in sample(discover(str(tmp_path), "text")) for word in text.split()}
    assert words == {"harbour", "lighthouse"}
