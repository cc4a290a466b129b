"""One reader for each format: marks, cuts, damage and limits, each named by file and row."""

import gzip
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pdn.data.documents import discover
from pdn.data.prepare import Plan, Tokenisation
from pdn.data.records import json_lines, read_whole, rows
from pdn.data.row import BadRow
from pdn.data.shards import read_manifest
from pdn.errors import DataError
from tests.children import PYTHON_PATH
from tests.data.corpus import documents, tokenizer

ROOT = Path(__file__).parents[2]
TEXTS = documents(30)
PACK = {"": lambda b: b, ".gz": gzip.compress, ".zst": zstandard.compress}


def jsonl(texts) -> bytes:
    return b"".join(json.dumps({"text": t}).encode() + b"\n" for t in texts)


def read(path: Path) -> list[str]:
    return [t for b in discover(str(path), "text").batches(None) for t in b.texts]


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read(path)
    assert caught.value.exit_code == 65
    return str(caught.value)


@pytest.mark.parametrize("pack", PACK)
def test_a_byte_order_mark_is_no_text(tmp_path, pack):
    mark = b"\xef\xbb\xbf"
    (tmp_path / f"a.txt{pack}").write_bytes(PACK[pack](mark + "tide é\nlamp".encode()))
    (tmp_path / f"b.jsonl{pack}").write_bytes(PACK[pack](mark + jsonl(["one", "\ufefftwo"])))
    assert read(tmp_path) == ["tide é\nlamp", "one", "two"]
    assert read_whole(tmp_path / f"a.txt{pack}") == "tide é\nlamp"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_another_encoding_is_named_by_its_mark(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes("tide".encode(encoding))
    assert f"iconv -f {encoding.upper()} -t UTF-8" in refusal(tmp_path / "a.txt")


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_another_encoding_without_its_mark_is_named_and_not_read_as_text(tmp_path, name, encoding):
    (tmp_path / name).write_bytes(jsonl(["tide"]).decode().encode(encoding))
    said = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")
    assert f"iconv -f {said} -t UTF-8" in refusal(tmp_path / name)


def test_a_mark_within_files_that_were_put_together_is_no_fault(tmp_path):
    part = b"\xef\xbb\xbf" + jsonl(["tide"])
    (tmp_path / "a.jsonl").write_bytes(part + part)
    assert read(tmp_path) == ["tide", "tide"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (r'{"text": "a\ud800b"}', r"line 2: 'text', character 1: \ud800, half of a pair"),
        ('{"text": "a", "text": "b"}', "line 2: 'text' is there twice"),
        ('{"text": "a\0b"}', "line 2: not JSON (Invalid control character"),
        ("\0\0\0", "line 2: not JSON"),
    ],
)
def test_a_line_that_is_no_one_text_is_a_bad_row(tmp_path, line, said):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "good", "x": 1, "x": 2}}\n{line}\n')
    assert said in refusal(tmp_path)
    (batch,) = discover(str(tmp_path), "text", skip_bad_rows=True).batches(None)
    assert batch.texts == ["good"] and len(batch.bad_rows) == 1


def test_a_compressed_file_may_begin_with_a_frame_to_skip(tmp_path):
    frame = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"  # as pzstd writes before each of its own
    packed = zstandard.compress(jsonl(["tide"]))
    (tmp_path / "a.jsonl.zst").write_bytes(frame + packed + frame + packed + frame)
    assert read(tmp_path) == ["tide", "tide"]


def test_lines_end_at_line_feeds_alone(tmp_path):
    lines = ["a\u2028b", "c\x85d", "e\x0bf"]
    content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (tmp_path / "prompts.jsonl").write_text(content)
    assert [value for _, value in json_lines(tmp_path / "prompts.jsonl")] == lines


@pytest.mark.parametrize("pack", PACK)
def test_a_text_file_of_windows_gives_the_same_documents(tmp_path, monkeypatch, pack):
    monkeypatch.setattr("pdn.data.records.LONGEST_TEXT", 64)
    text = "\n".join(TEXTS) + "\n\nprogress\rdone\n"  # of these, the one \r is text
    documents = []
    for end in ("\n", "\r\n"):
        path = tmp_path / f"text.txt{pack}"
        path.write_bytes(PACK[pack](text.replace("\n", end).encode()))
        documents.append("".join(read(path)))
        assert read_whole(path) == text
    assert documents == [text, text]


def test_a_line_end_of_windows_is_never_cut(tmp_path, monkeypatch):
    monkeypatch.setattr("pdn.data.records.LONGEST_TEXT", 8)
    for longest in range(5, 20):
        text = f"{'x' * longest}\r\n{'é' * longest}\r\nend\r"
        (tmp_path / "a.txt").write_bytes(text.encode())
        assert "".join(read(tmp_path / "a.txt")) == text.replace("\r\n", "\n")


def test_line_ends_within_rows_are_text(tmp_path):
    texts = ["one\r\ntwo", "three\r"]
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts).replace(b"\n", b"\r\n"))
    pq.write_table(pa.table({"text": texts}), tmp_path / "b.parquet")
    assert read(tmp_path / "a.jsonl") == read(tmp_path / "b.parquet") == texts


def latin1(path: Path, kind: pa.DataType) -> None:
    texts = [t.encode() for t in TEXTS]
    texts[17] = b"R\xc9UNION"
    binary = pa.array(texts, pa.binary())
    column = pa.Array.from_buffers(pa.string(), len(binary), binary.buffers())
    pq.write_table(pa.table({"text": column if kind == pa.string() else binary}), path)


@pytest.mark.parametrize("kind", [pa.string(), pa.binary()], ids=str)
def test_a_parquet_value_that_is_no_utf8_is_named_by_its_row(tmp_path, kind):
    latin1(tmp_path / "a.parquet", kind)
    assert "a.parquet: row 17, byte 1 of 'text': 0xc9, expected UTF-8" in refusal(tmp_path)


@pytest.mark.parametrize(
    "kind", [pa.binary(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str
)
def test_parquet_columns_of_strings_and_bytes_are_text(tmp_path, kind):
    column = pa.array([*TEXTS, None, *TEXTS], pa.string())
    column = column.dictionary_encode() if pa.types.is_dictionary(kind) else column.cast(kind)
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet", row_group_size=7)
    assert list(rows(tmp_path / "a.parquet", "text")) == [*TEXTS, "", *TEXTS]


def test_a_parquet_column_of_another_type_is_refused_by_its_type(tmp_path):
    table = pa.table({"text": pa.array([{"body": "x"}]), "title": ["y"]})
    pq.write_table(table, tmp_path / "a.parquet")
    said = refusal(tmp_path)
    assert "column 'text' is struct<body: string>" in said and "such as ['title']" in said


def test_two_parquet_columns_of_one_name_are_refused(tmp_path):
    table = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    assert "2 columns 'text'; expected one" in refusal(tmp_path)


def test_a_row_group_of_enormous_rows_is_left_out_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("pdn.data.parquet.LONGEST_ROW", 1000)
    texts = ["tide", "x" * 3000, "lamp"]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=1)
    assert "row 1 (row group 1): 'text' has " in refusal(tmp_path)
    (batch,) = discover(str(tmp_path), "text", skip_bad_rows=True).batches(None)
    assert batch.texts == ["tide", "lamp"] and len(batch.bad_rows) == 1


def test_damaged_parquet_is_named_and_never_a_traceback(tmp_path):
    import random

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": TEXTS * 40}), path, row_group_size=100, compression="snappy")
    whole, rng, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(8):
            damaged[rng.randrange(4, len(damaged) - 8)] ^= rng.randrange(1, 256)
        path.write_bytes(damaged)
        try:
            read(tmp_path)
        except DataError as error:
            refused += 1
            assert "a.parquet" in str(error) and error.exit_code == 65
    assert refused > 30


@pytest.mark.parametrize("number", ["9" * 5000, "1e999", "-0.5"])
def test_numbers_that_are_not_used_are_no_fault(tmp_path, number):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "tide", "id": {number}}}\n')
    assert read(tmp_path) == ["tide"]


def test_a_decoders_limit_is_not_called_damage(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x"})[:-1] + ', "y": ' + "[" * 99999)
    assert "E-DATA-LIMIT" in refusal(tmp_path / "a.jsonl")
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=30)
    pack = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "b.txt.zst").write_bytes(pack.compress(b"tide " * 200_000) + pack.flush())
    said = refusal(tmp_path / "b.txt.zst")
    assert "E-DATA-LIMIT" in said and "window" in said


def test_a_row_beyond_the_limit_is_named_and_the_next_one_is_whole(tmp_path, monkeypatch):
    for place in ("records", "parquet"):
        monkeypatch.setattr(f"pdn.data.{place}.LONGEST_ROW", 1000)
    (tmp_path / "a.jsonl").write_bytes(jsonl(["one", "x" * 1000, "three"]))
    found = list(rows(tmp_path / "a.jsonl", "text"))
    assert found[::2] == ["one", "three"] and isinstance(found[1], BadRow)
    assert "a.jsonl: line 2: longer than 1,000 bytes" in str(found[1])
    pq.write_table(pa.table({"text": ["one", "x" * 1001, "three"]}), tmp_path / "b.parquet")
    found = list(rows(tmp_path / "b.parquet", "text"))
    assert found[::2] == ["one", "three"] and "row 1: 'text' has 1,001 bytes" in str(found[1])


def bad_corpus(path: Path, bad: int) -> None:
    lines = [json.dumps({"text": t}) for t in documents(900)]
    for i in range(bad):
        lines.insert(9 * i, "{not json")
    path.write_text("\n".join(lines) + "\n")


def tokenise(path: Path, out: Path, *, stop: int | None = None):
    source = discover(str(path), "text", skip_bad_rows=True)
    steps = Tokenisation(source, out, tokenizer(), Plan(3000), 1).run()
    for _ in zip(range(stop or 10**9), steps):
        pass
    steps.close()
    return read_manifest(out / "train")


def test_skipped_rows_are_counted_once_however_often_the_work_is_interrupted(tmp_path):
    bad_corpus(tmp_path / "a.jsonl", 40)
    for _ in range(3):
        tokenise(tmp_path / "a.jsonl", tmp_path / "parts", stop=1)
    parts = tokenise(tmp_path / "a.jsonl", tmp_path / "parts")
    whole = tokenise(tmp_path / "a.jsonl", tmp_path / "whole")
    assert parts.left_out == whole.left_out == {"bad rows": 40}
    assert parts.content == whole.content and whole.documents == 900


def test_too_many_bad_rows_stop_even_where_they_are_skipped(tmp_path):
    bad_corpus(tmp_path / "a.jsonl", 101)
    with pytest.raises(DataError, match=r"E-DATA-BAD-ROWS.*101 bad rows.*line \d+: not JSON"):
        tokenise(tmp_path / "a.jsonl", tmp_path / "out")


def test_a_text_without_tokens_is_no_document(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    from pdn.data.tokenizer import TokenizerFile

    lossy = Tokenizer(models.BPE())
    lossy.pre_tokenizer = pre_tokenizers.Whitespace()
    lossy.train_from_iterator(TEXTS, trainers.BpeTrainer(special_tokens=["</s>"]))
    file = TokenizerFile("lossy", lossy.to_str().encode(), 30000, 0)
    (tmp_path / "a.jsonl").write_bytes(jsonl(["tide", "海", "lamp"]))
    source = discover(str(tmp_path / "a.jsonl"), "text")
    list(Tokenisation(source, tmp_path / "out", file, Plan(3000), 1).run())
    manifest = read_manifest(tmp_path / "out" / "train")
    assert manifest.documents == 2 and manifest.left_out == {"without tokens": 1}


def line(path: Path, size: int) -> None:
    """Write one line of `size` characters of text, packed by gzip."""
    with gzip.open(path, "wb", 1) as f:
        f.write(b'{"text": "')
        for _ in range(size // 1_000_000):
            f.write(b"tide lamp " * 100_000)
        f.write(b'"}\n')


@pytest.mark.parametrize("kind", ["gzip of one line", "parquet of one row", "repeated rows", "txt"])
def test_memory_does_not_grow_with_the_longest_row(tmp_path, kind):
    path = tmp_path / "a.parquet"
    if kind == "gzip of one line":
        path = tmp_path / "a.jsonl.gz"
        line(path, 700_000_000)  # beyond the limit: refused
    elif kind == "txt":
        path = tmp_path / "a.txt.gz"
        with gzip.open(path, "wb", 1) as f:
            for _ in range(8):
                f.write(b"tide lamp " * 100_000)
    elif kind == "parquet of one row":
        pq.write_table(pa.table({"text": ["tide lamp " * 600_000]}), path, compression="zstd")
    else:
        texts = pa.array(["tide lamp " * 200_000] * 600)
        # Leave out Arrow's schema, which would make it a dictionary in any case.
        table = pa.table({"text": texts.dictionary_encode()})
        pq.write_table(table, path, compression="zstd", store_schema=False)
    (tmp_path / "tokenizer.json").write_bytes(tokenizer().content)
    program = (
        "import resource, sys; from pdn.data.documents import discover;"
        "from pdn.data.encoders import Encoders; from pdn.data.tokenizer import load\n"
        "used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "file = load(sys.argv[2], revision=None, eos_token=None); encoders = Encoders(file, 1)\n"
        "source = discover(sys.argv[1], 'text'); before, count = used(), 0\n"
        "try:\n"
        "    for n, encoded in enumerate(encoders.run(source.batches(None))):\n"
        "        count += len(encoded.tokens)\n"
        "        if n == 1: break\n"
        "except Exception as error: print(error)\n"
        "print(count, (used() - before) // 1024); encoders.close()"
    )
    command = [sys.executable, "-c", program, str(path), str(tmp_path / "tokenizer.json")]
    env = {**os.environ, "PYTHONPATH": PYTHON_PATH, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    *said, last = done.stdout.splitlines()
    count, grown = map(int, last.split())
    assert grown < 512, grown
    assert (count > 100_000) == (kind != "gzip of one line"), done.stdout
    if kind == "gzip of one line":
        assert "a.jsonl.gz: line 1: longer than 33,554,432 bytes" in said[0]


def test_many_processes_within_few_open_files(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))\n"
        "from pdn.data.encoders import Encoders; from tests.data.corpus import tokenizer\n"
        "try: Encoders(tokenizer(), 300)\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    env = {**os.environ, "PYTHONPATH": PYTHON_PATH, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=120
    )
    assert "E-PROCESSES] 300 tokenising processes" in done.stdout, done.stdout + done.stderr
    assert "ulimit -n" in done.stdout and soft <= hard
