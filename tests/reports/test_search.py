"""A search asks for trials, is told what came of them, and goes on where it was."""

import json
import sys

import pytest

from pdn.errors import ConfigError
from pdn.reports.search import Search, Space, spaces_of
from pdn.reports.sweep import rows
from pdn.reports.trials import run_trials

METRIC = "validation/loss"
# Best at a rate of 1e-3; a rate above 5e-3 fails.
TRAINER = """
import json, math, os, sys
words = dict(word.split("=", 1) for word in sys.argv[1:])
run = os.path.join(words["output_dir"], words["name"])
os.makedirs(run, exist_ok=True)
open(run + "/launches", "a").write("x")
rate = float(words["optim.lr"])
if rate > 5e-3:
    sys.exit(78)
with open(run + "/metrics.jsonl", "w") as file:
    value = abs(math.log10(rate) + 3) + (words["model"] == "b")
    file.write(json.dumps({"step": 4, "loss": 1.0, "validation/loss": value}) + chr(10))
open(run + "/status.json", "w").write(json.dumps({"state": "finished", "step": 4}))
"""
WORDS = ["model=a,b", "optim.lr=log(1e-4,1e-2)", "trainer.steps=4"]


def test_ranges_are_told_from_lists():
    spaces, others = spaces_of([*WORDS, "model.num_layers=int(2, 4)"])
    assert spaces["optim.lr"] == Space("log", 1e-4, 1e-2)
    assert spaces["model.num_layers"].text(3.0) == "3"
    assert others == ["model=a,b", "trainer.steps=4"]
    assert spaces["optim.lr"].at_edge(1.1e-4) and not spaces["optim.lr"].at_edge(1e-3)
    for wrong in ("optim.lr=log(0,1)", "optim.lr=uniform(2,1)", "optim.lr=int(a,b)"):
        with pytest.raises(ConfigError, match="two ends in order"):
            spaces_of([wrong])


def sweep(directory, tries: int) -> Search:
    search = Search(WORDS, tries=tries, slots=1, directory=directory, metric=METRIC)

    def watch(running, failed) -> None:
        search.failed = failed

    run_trials(
        search.ready, directory, slots=1, seconds=None, say=lambda line: None, watch=watch,
        command=[sys.executable, "-c", TRAINER],
    )  # fmt: skip
    return search


def test_a_search_goes_on_where_it_was_and_finds_the_best_rate_of_each_arm(tmp_path):
    pytest.importorskip("optuna")
    sweep(tmp_path / "parts", 4)
    names = [path.parent.name for path in (tmp_path / "parts").glob("*/launches")]
    assert len(names) == 8
    search = sweep(tmp_path / "parts", 8)
    launches = [file.read_text() for file in (tmp_path / "parts").glob("*/launches")]
    assert len(launches) == 16 and set(launches) <= {"x", "xx"}  # what failed is tried again
    table = rows(search, tmp_path / "parts", METRIC)
    best = search.best(table, METRIC)
    assert [arm for arm, *_ in best] == ["a", "b"]
    assert all(4e-4 < float(row["optim.lr"]) < 3e-3 and not edges for _, row, edges in best)
    assert [found.arm for found in search.rates(table, METRIC)] == ["a", "b"]
    # the same suggestions as of a search that was never interrupted
    whole = sweep(tmp_path / "whole", 8)
    assert whole.trials.keys() == search.trials.keys()
    firsts = {name: own for name, own in whole.trials.items() if name[-3:] <= "004"}
    assert firsts == {name: search.trials[name] for name in firsts}


def test_records_of_another_search_are_refused(tmp_path):
    pytest.importorskip("optuna")
    record = {"arm": "a", "trial": "a-try001", "values": {"optim.weight_decay": "0.1"}}
    (tmp_path / "search.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(ConfigError, match="another search"):
        Search(WORDS, tries=4, slots=1, directory=tmp_path, metric=METRIC)
    with pytest.raises(ConfigError, match="one seed"):
        Search([*WORDS, "seed=1,2"], tries=4, slots=1, directory=tmp_path / "b", metric=METRIC)


def test_a_search_without_optuna_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"pip install 'pdn\[search\]'"):
        Search(WORDS, tries=4, slots=1, directory=tmp_path, metric=METRIC)
