"""The corpus of source files: each text once, in an order that no file system decides."""

import json

import pytest

from pdn.errors import ConfigError
from scripts.collect_sources import main

CODE = "def add(a, b):\n    return a + b\n"


def filled(root, names: dict[str, str]) -> None:
    for name, text in names.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def collect(root, out, *words: str) -> list[dict]:
    main([f"roots={root}", f"out={out}", "min_bytes=10", *words])
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_each_text_is_collected_once_and_copies_count_whatever_their_spaces(tmp_path):
    texts = {f"p/{i}.py": f"{CODE}# {i}\n" for i in range(9)}
    copies = {"a/copy.py": texts["p/3.py"], "z/spaces.py": texts["p/4.py"].replace("\n", "\n\n")}
    filled(tmp_path / "root", texts | copies)
    found = collect(tmp_path / "root", tmp_path / "out.jsonl")
    assert len(found) == 9
    assert {d["path"] for d in found} == set(texts) - {"p/3.py"} | {"a/copy.py"}


def test_the_order_depends_on_the_texts_alone(tmp_path):
    texts = [f"{CODE}# {i}\n" for i in range(9)]
    filled(tmp_path / "one", {f"{i}.py": text for i, text in enumerate(texts)})
    filled(tmp_path / "two", {f"q/{9 - i}.py": text for i, text in enumerate(texts)})
    one, two = (collect(tmp_path / n, tmp_path / f"{n}.jsonl") for n in ("one", "two"))
    assert [d["text"] for d in one] == [d["text"] for d in two] != texts


def test_files_of_other_sizes_tests_and_other_encodings_are_left_out(tmp_path):
    root = tmp_path / "root"
    filled(
        root, {"a.py": CODE, "b.py": "x", "c.py": "y" * 99, "tests/d.py": CODE * 2, "e.txt": CODE}
    )
    (root / "f.py").write_bytes(b"# caf\xe9 of another time\n")
    assert [d["path"] for d in collect(root, tmp_path / "out.jsonl", "max_bytes=90")] == ["a.py"]


def test_a_prefix_holds_as_many_documents_as_fit(tmp_path):
    filled(tmp_path / "root", {f"{i}.py": f"{CODE}# {i}\n" for i in range(9)})
    whole = collect(tmp_path / "root", tmp_path / "whole.jsonl")
    room = sum(len(d["text"]) for d in whole[:4])
    part = collect(tmp_path / "root", tmp_path / "part.jsonl", f"max_characters={room}")
    assert part == whole[:4]
    manifest = json.loads((tmp_path / "part.jsonl.manifest.json").read_text())
    assert (manifest["documents"], manifest["characters"]) == (4, room)


def test_a_compressed_corpus_is_one_that_the_data_pipeline_reads(tmp_path):
    from pdn.data.documents import discover

    filled(tmp_path / "root", {f"{i}.py": f"{CODE}# {i}\n" for i in range(3)})
    main([f"roots={tmp_path / 'root'}", f"out={tmp_path / 'out.jsonl.zst'}", "min_bytes=10"])
    batches = discover(str(tmp_path / "out.jsonl.zst"), "text").batches(None)
    assert sorted(t for b in batches for t in b.texts) == [f"{CODE}# {i}\n" for i in range(3)]


@pytest.mark.parametrize(("root", "said"), [("nowhere", "no such directory"), ("empty", "no .py")])
def test_roots_without_sources_are_named(tmp_path, root, said):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=said):
        main([f"roots={tmp_path / root}", f"out={tmp_path / 'out.jsonl'}"])
