"""One way to open a tokenizer: whole texts, no ids from outside the text, and nothing lost."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from pdn.data import codec as module
from pdn.data.codec import Codec, Unencodable, open_codec, pieces, require_survival
from pdn.data.documents import discover
from pdn.data.encoders import Encoders
from pdn.data.tokenizer import TokenizerFile, load
from pdn.errors import DataError
from tests.data.corpus import documents, tokenizer

END = "</s>"


def unigram() -> Tokenizer:
    """Return a Unigram model, in whose vocabulary the end token is a piece like any other."""
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.decoder = decoders.Metaspace()
    letters = [chr(c) for c in range(33, 127)]
    trainer = trainers.UnigramTrainer(
        vocab_size=300,
        special_tokens=["<unk>", END],
        unk_token="<unk>",
        initial_alphabet=letters,
        show_progress=False,
    )
    trained.train_from_iterator(documents(60), trainer)
    return trained


def codec_of(tokenizer: Tokenizer, end: str = END) -> Codec:
    return Codec(tokenizer.to_str().encode(), "test", tokenizer.token_to_id(end))


def test_a_text_has_the_same_tokens_every_time_whatever_the_tokenizer_was_trained_with():
    content = json.loads(tokenizer().content)
    plain = Codec(json.dumps(content).encode(), "test", 0).ids(documents(1)[0])
    content["model"]["dropout"] = 0.5
    assert Codec(json.dumps(content).encode(), "test", 0).ids(documents(1)[0]) == plain


def test_truncation_padding_and_added_tokens_of_the_file_do_not_count():
    bare = Tokenizer.from_str(tokenizer().content.decode())
    expected = bare.encode(documents(1)[0] * 20, add_special_tokens=False).ids
    bare.enable_truncation(5)
    bare.enable_padding(length=4000)
    bare.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    changed = codec_of(bare, "<|endoftext|>")
    assert changed.ids(documents(1)[0] * 20) == expected and len(expected) > 100
    assert [len(row) for row in changed.encode(["a", "tide lamp"])] == [
        len(tokenizer().build().ids(text)) for text in ("a", "tide lamp")
    ]


@pytest.mark.parametrize("special", [True, False])
def test_no_text_gives_the_end_token(special):
    content = json.loads(tokenizer().content)
    content["added_tokens"][0]["special"] = special
    built = Codec(json.dumps(content).encode(), "test", 0)
    for text in ("<|endoftext|>", "a<|endoftext|><|endoftext|>b", "x" * 99 + "<|endoftext|>"):
        ids = built.ids(text)
        assert 0 not in ids and built.decode(ids) == text


def test_no_text_gives_a_special_token_of_a_unigram_model():
    bare = unigram()
    assert bare.token_to_id(END) in bare.encode(f"tide{END}lamp").ids  # what is guarded against
    built = codec_of(bare)
    ids = built.ids(f"tide{END}lamp")
    assert bare.token_to_id(END) not in ids
    assert built.decode(ids).replace(" ", "") == f"tide{END}lamp"


def test_an_end_token_that_is_a_character_of_the_text_is_refused():
    built = Codec(tokenizer().content, "test", tokenizer().build().ids("a")[0])
    with pytest.raises(Unencodable, match="E-TOKENIZER-RESERVED"):
        built.ids("lamp and tide")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_text_that_the_tokenizer_fails_on_is_named_at_once(tmp_path, processes):
    words = Tokenizer(models.WordLevel())
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=[END], show_progress=False)
    words.train_from_iterator(documents(20), trainer)
    lines = [*documents(20), "unheard"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in lines))
    file = TokenizerFile("words", words.to_str().encode(), 100, 0)
    encoders = Encoders(file, processes)
    with pytest.raises(DataError, match=r"E-TOKENIZER-TEXT\].*a\.jsonl: line 21: 'unheard'") as e:
        list(encoders.run(discover(str(tmp_path), "text").batches(None)))
    encoders.close()
    assert e.value.exit_code == 65


def test_a_tokenizer_that_loses_text_is_refused_with_the_share():
    lossy = Tokenizer(models.BPE())
    lossy.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(special_tokens=[END], show_progress=False)
    lossy.train_from_iterator(documents(50), trainer)
    built = codec_of(lossy)
    sample = [("line 1", "tide lamp"), ("line 2", "海 lamp")]
    with pytest.raises(DataError, match=r"1 of 13 characters of a sample \(7\.69%\)"):
        require_survival(built, sample, "corpus", 0.01)
    assert "1 of 13 characters" in require_survival(built, sample, "corpus", 0.1)


def test_a_byte_level_tokenizer_that_lacks_bytes_loses_text():
    lossy = Tokenizer(models.BPE())
    lossy.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    lossy.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(special_tokens=[END], show_progress=False)
    lossy.train_from_iterator(["tide lamp Ã"], trainer)  # has the first byte of é, not the second
    assert codec_of(lossy).lost_characters(["tidé"]) == (1, 4)


@pytest.mark.parametrize("make", [lambda: tokenizer().build(), lambda: codec_of(unigram())])
def test_ordinary_tokenizers_lose_nothing(make):
    assert make().lost_characters(documents(50))[0] == 0


def test_what_a_normalizer_rewrites_is_not_lost():
    from tokenizers import normalizers

    lower = Tokenizer.from_str(tokenizer().content.decode())
    lower.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    assert codec_of(lower, "<|endoftext|>").lost_characters(["Tide LAMP ﬁne"]) == (0, 11)


def test_a_long_text_has_the_same_tokens_encoded_in_pieces(monkeypatch):
    text = " ".join(documents(200))
    whole = tokenizer().build().ids(text)
    monkeypatch.setattr(module, "PIECE_CHARACTERS", 1000)
    monkeypatch.setattr(module, "BOUNDARY_SEARCH", 500)
    built = tokenizer().build()
    assert "".join(pieces(text)) == text and max(map(len, pieces(text))) <= 1000
    assert built.ids(text) == whole
    many = ["a", text, "b", *documents(30), text]
    assert all(np.array_equal(row, built.ids(one)) for row, one in zip(built.encode(many), many))
    assert "".join(pieces("x" * 2500)) == "x" * 2500


@pytest.mark.parametrize("largest", [3_000_000_000, 1 << 22])
def test_absurd_ids_are_refused(tmp_path, largest):
    content = json.loads(tokenizer().content)
    content["added_tokens"].append({**content["added_tokens"][0], "id": largest, "content": "<x>"})
    content["model"]["vocab"]["<x>"] = largest
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"E-TOKENIZER-(IDS|JSON)"):
        load(str(tmp_path), revision=None, eos_token=None)


def test_a_pipe_is_no_tokenizer(tmp_path):
    import os

    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match="not a regular file"):
        open_codec(tmp_path / "tokenizer.json", 0)
