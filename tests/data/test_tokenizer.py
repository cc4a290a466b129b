"""Tokenizers: loaded, trained, checked; every bad one is refused with the fix."""

import json

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from pdn.data.tokenizer import load, train
from pdn.errors import DataError, DataStorageError
from tests.data.corpus import documents, tokenizer


@pytest.fixture
def path(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(tokenizer().content)
    return tmp_path / "tokenizer.json"


def refusal(name, **keys) -> str:
    with pytest.raises(DataError) as caught:
        load(str(name), **{"revision": None, "eos_token": None, **keys})
    return str(caught.value)


def test_a_file_and_its_directory_load_alike(path):
    a, b = (load(str(p), revision=None, eos_token=None) for p in (path, path.parent))
    assert (
        a.content == b.content
        and a.identity.sha256 == b.identity.sha256
        and (a.vocab_size, a.eos_id) == (300, 0)
    )


def test_the_mark_of_a_file_is_no_part_of_a_tokenizer(path):
    plain = load(str(path), revision=None, eos_token=None)
    path.write_bytes(b"\xef\xbb\xbf" + plain.content)
    config = b'\xef\xbb\xbf{"eos_token": "<|endoftext|>"}'
    path.with_name("tokenizer_config.json").write_bytes(config)
    assert load(str(path), revision=None, eos_token=None).content == plain.content


def test_training_is_deterministic():
    assert train(documents(50), 300).content == train(documents(50), 300).content


def test_a_missing_file_is_refused(tmp_path):
    assert "E-TOKENIZER-MISSING" in refusal(tmp_path / "none.json")
    assert "E-TOKENIZER-MISSING" in refusal("./none")


def test_malformed_json_is_refused(path):
    path.write_bytes(tokenizer().content[:-10])
    assert f"E-TOKENIZER-JSON] {path}: not a tokenizer.json" in refusal(path)


def test_a_tokenizer_without_an_end_token_is_refused(path):
    path.write_text(tokenizer().content.decode().replace("<|endoftext|>", "<|other|>"))
    assert "no end-of-document token; expected one of" in refusal(path)
    assert load(str(path), revision=None, eos_token="<|other|>").eos_id == 0
    assert "'<|x|>' is not in its vocabulary" in refusal(path, eos_token="<|x|>")
    path.write_bytes(tokenizer().content)
    assert "name one that is, as '<|endoftext|>'" in refusal(path, eos_token="</s>")


def test_the_end_token_of_the_tokenizer_config_is_used(path):
    path.write_text(tokenizer().content.decode().replace("<|endoftext|>", "<|other|>"))
    config = path.with_name("tokenizer_config.json")
    config.write_text(json.dumps({"eos_token": {"content": "<|other|>"}}))
    assert load(str(path), revision=None, eos_token=None).eos_id == 0
    config.write_text("{")
    assert "tokenizer_config.json: malformed" in refusal(path)


@pytest.mark.parametrize("eos", ["<nope>", ["</s>"], {"content": ["</s>"]}, 7])
def test_an_end_token_that_is_none_is_refused_and_no_other_taken(path, eos):
    path.with_name("tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    assert "tokenizer_config.json: its eos_token " in refusal(path)
    assert load(str(path), revision=None, eos_token="<|endoftext|>").eos_id == 0


@pytest.mark.parametrize("name", ["two words/x", "gpt2@main", "a--b", "owner/"])
def test_a_name_that_no_repository_has_is_no_fault_of_the_network(name):
    with pytest.raises(DataError, match=r"E-TOKENIZER-MISSING\] .*owner/name on the hub") as caught:
        load(name, revision=None, eos_token=None)
    assert caught.value.exit_code == 65


def test_a_tokenizer_that_needs_its_own_code_is_refused(path):
    path.unlink()
    path.with_name("tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}})
    )
    (path.parent / "evil.py").write_text("raise SystemExit('executed')")
    assert "E-TOKENIZER-CODE" in refusal(path.parent)


@pytest.mark.parametrize(
    "error",
    [ConnectionError("refused"), LocalEntryNotFoundError("offline")],
    ids=lambda e: type(e).__name__,
)
def test_an_unreachable_hub_is_an_input_output_error(monkeypatch, error):
    def refuse(*args, **keys):
        raise error

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *args, **keys: None)
    with pytest.raises(DataStorageError, match=r"E-TOKENIZER-HUB\] some/name"):
        load("some/name", revision=None, eos_token=None)


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch):
    def refuse(*args, **keys):
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a, **k: pytest.fail("asked"))
    with pytest.raises(DataStorageError, match=r"some/name: no such local path, and the hub can"):
        load("some/name", revision=None, eos_token=None)


def test_text_that_looks_like_an_end_token_is_text():
    built = tokenizer().build()
    assert tokenizer().eos_id not in built.ids("a <|endoftext|> b")
