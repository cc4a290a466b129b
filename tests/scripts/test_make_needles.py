"""Texts to learn the needle task from: of its form, each with its own needle."""

import json

import pytest

from pdn.errors import ConfigError
from pdn.evals.probes.needle import ANSWER, NEEDLE, TASK
from scripts.make_needles import main


def test_each_text_hides_a_value_and_ends_with_it_and_is_always_the_same(tmp_path):
    out = tmp_path / "new" / "needles.jsonl"
    main([f"out={out}", "texts=40", "sentences=9"])
    texts = [json.loads(line)["text"] for line in out.read_text().splitlines()]
    assert len(set(texts)) == 40
    form = {"kind": "number"}
    for text in texts:
        task, hay, question = text.split("\n")
        assert task == TASK.format(**form)
        key, value = question.split(" for ")[-1].split(" mentioned")[0], question.split()[-1][:-1]
        assert value.isdigit() and len(value) == 7
        assert question.endswith(f"{ANSWER.format(key=key, **form)} {value}.")
        assert NEEDLE.format(key=key, value=value, **form) in hay
        assert 1 <= hay.count(".") - 1 <= 9
    places = {text.split("\n")[1].index("One of the special") for text in texts}
    assert len(places) > 5
    main([f"out={tmp_path / 'again.jsonl'}", "texts=40", "sentences=9"])
    assert (tmp_path / "again.jsonl").read_bytes() == out.read_bytes()


def test_another_kind_of_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"found '\.txt'; expected \.jsonl"):
        main([f"out={tmp_path / 'needles.txt'}"])
