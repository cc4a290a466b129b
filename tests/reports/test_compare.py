"""compare.py: searches, trains what is missing, and says the difference."""

import functools
import json

import pytest

import scripts.compare
from pdn.errors import ConfigError
from pdn.reports.compare import matched_size
from pdn.reports.trials import run_trials
from tests.presets import model_config


@pytest.fixture
def compare(tmp_path, command, monkeypatch, capsys):
    """Run compare.py with words on stand-in runs; what it printed."""
    quiet = functools.partial(run_trials, say=lambda line: None)
    monkeypatch.setattr(scripts.compare, "run_trials", quiet)
    monkeypatch.setattr(scripts.compare, "launcher", lambda processes: tuple(command))
    monkeypatch.setattr(scripts.compare, "require_valid", lambda study: None)  # of stand-ins

    def run(*words: str) -> str:
        finished = any(word.startswith("base=/") for word in words)
        training = [] if finished else [f"runs={tmp_path / 'runs'}", "slots=2"]
        scripts.compare.main([*training, *words])
        return capsys.readouterr().out

    return run


def launches(tmp_path) -> int:
    return sum(len(file.read_text()) for file in (tmp_path / "runs").glob("*/launches"))


def test_both_models_search_their_rate_and_are_paired_and_a_second_launch_trains_nothing(
    compare, tmp_path
):
    words = ["base=gdn", "other=pgdn", "seeds=3", "rates=1e-3,2e-3,4e-3"]
    said = compare(*words)
    assert "best learning rate of gdn: 0.002\n" in said
    assert "pgdn minus gdn: -0.10100" in said and "n = 3 pairs" in said
    assert "verdict: pgdn is better" in said
    assert launches(tmp_path) == 2 * 3 + 2 * 3
    assert compare(*words) == said
    assert launches(tmp_path) == 12


def test_sequences_are_paired_within_the_seeds(compare, tmp_path):
    said = compare("base=gdn", "other=pgdn", "seeds=2", "rates=2e-3")
    assert "over other text, these runs as they are: -0.10150 [-0.10150, -0.10150]" in said
    assert "20 sequences resampled in pairs" in said
    assert "so one of 0.01 between these runs needs 2 sequences, 16 tokens" in said
    assert "over other seeds and other text: -0.10150" in said
    run = tmp_path / "runs" / "gdn-lr0.002-seed1"
    file = run / "validation.json"
    file.write_text(file.read_text().replace('"step": 2', '"step": 1'))  # not of the last step
    base, other = run, tmp_path / "runs" / "pgdn-lr0.002-seed1"
    assert "paired sequences: none" in compare(f"base={base}", f"other={other}")


def test_a_best_rate_at_the_edge_of_the_search_is_said(compare):
    said = compare("base=gdn", "other=pgdn", "seeds=2", "rates=2e-3,4e-3")
    assert "0.002, at the edge of rates: search further" in said


def test_a_rate_that_diverges_is_worse_than_any_other_and_ends_no_comparison(compare):
    words = ["base=gdn", "other=pgdn", "seeds=2", "stub.diverges_above=3e-3"]
    said = compare(*words, "rates=1e-3,2e-3,4e-3")
    assert "gdn diverged at 0.004" in said and "pgdn diverged at 0.004" in said
    assert "best learning rate of gdn: 0.002\n" in said and "n = 2 pairs" in said
    with pytest.raises(ConfigError, match=r"gdn-lr0\.008-seed1000: .*E-NONFINITE"):
        compare(*words, "rates=4e-3,8e-3")


def test_a_trial_that_could_not_start_is_refused_before_any_other_does(monkeypatch):
    monkeypatch.setattr(scripts.compare, "run_trials", lambda *_, **__: pytest.fail("started"))
    with pytest.raises(ConfigError, match=r"trial gdn-lr99-seed1000: optim\.lr = 99"):
        scripts.compare.main(["base=gdn", "other=pgdn", "rates=1e-3,99"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rates=1e-3,abc"], "rates=1e-3,abc: expected numbers above 0"),
        (["rates=0,1e-3"], "rates=0,1e-3: expected numbers above 0"),
        (["rates=1e-3,0.001"], "expected numbers above 0, each once"),
        (["seeds=0"], "seeds: found '0'; expected at least 1"),
        (["seeds=1000"], "seeds: found '1000'; expected less than 1000"),
        (["base="], "base= other=pgdn: expected two models"),
        (["base=gdn_340m"], "write base=gdn size=340m"),
        (["base=runs/none"], r"base=runs/none: found no config.yaml in it"),
        (["model=kda_tiny"], "write base=<name> other=<name>"),
        (["optim.lr=1e-3"], "optim.lr=1e-3: without effect, .*; write rates=<numbers>"),
        (["data.seed=3"], "write data_seed=<number>"),
        (["trainer.dry_run=true"], "trial gdn-lr0.001-seed1000: trainer.dry_run = true"),
        (["trainer.stop_at=9"], "trial gdn-.*: trainer.stop_at = 9 of .*: write trainer.steps=9"),
        (["devices=0,0"], "devices=0,0: expected numbers of GPUs"),
        (["devices=cuda:0"], "devices=cuda:0: expected numbers of GPUs"),
    ],
)
def test_words_that_no_comparison_can_have_are_refused_before_it_begins(monkeypatch, words, said):
    monkeypatch.setattr(scripts.compare, "run_trials", None)
    keys = {word.partition("=")[0] for word in words}
    whole = [w for w in ("base=gdn", "other=pgdn", "rates=1e-3") if w.partition("=")[0] not in keys]
    with pytest.raises(ConfigError, match=said):
        scripts.compare.main([*whole, *words])


def test_gpus_and_processes_of_a_comparison_are_those_of_its_runs(monkeypatch, tmp_path):
    given = {}

    def start(ready, directory, **options):
        given.update(options, directory=directory)
        raise StopIteration

    monkeypatch.setattr(scripts.compare, "run_trials", start)
    words = [f"runs={tmp_path}/runs", "slots=2", "devices=0,1,2,3", "processes=2"]
    with pytest.raises(StopIteration):
        scripts.compare.main(["base=gdn", "other=pgdn", "rates=1e-3", *words])
    assert (given["slots"], list(given["devices"])) == (2, ["0", "1", "2", "3"])
    launch = " ".join(given["command"])
    assert launch.endswith("--nproc-per-node 2 -m pdn.cli.train") and "distributed.run" in launch


def test_finished_runs_are_paired_by_their_seed(compare, tmp_path):
    compare("base=gdn", "other=pgdn", "seeds=2", "rates=2e-3")
    base, other = (
        ",".join(str(tmp_path / "runs" / f"{arm}-lr0.002-seed{seed}") for seed in (2, 1))
        for arm in ("gdn", "pgdn")
    )
    assert "n = 2 pairs" in compare(f"base={base}", f"other={other}")


def test_words_of_train_py_reach_the_runs_and_change_what_a_directory_holds(compare):
    words = ["base=gdn", "other=pgdn", "seeds=2", "rates=2e-3"]
    compare(*words, "data.path=here")
    with pytest.raises(ConfigError, match=r"other words, differing in: data\.path=here"):
        compare(*words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["base=gdn", "other=pgdn"], "rates: none given"),
        (["base=gdn", "other=gdn", "rates=1e-3"], "expected two models"),
        (["base=gdn", "other=pgdn", "rates=2e-3", "seeds=2", "fail.x=1", "fail=9"], "no such key"),
        (["base=gdn", "other=pgdn", "rates=2e-3", "seeds=2", "stub.fail=9"], "told to fail"),
    ],
)
def test_what_cannot_be_compared_is_refused(compare, words, said):
    with pytest.raises(ConfigError, match=said):
        compare(*words)


@pytest.mark.parametrize(("what", "seq_len"), [("parameters", 64), ("flops", 2048)])
def test_a_model_is_matched_by_the_width_of_its_mlps(what, seq_len):
    base, other = (
        model_config(f"{name}_340m", "model.vocab_size=32000") for name in ("gdn", "kda")
    )
    size = matched_size(base, other, what=what, seq_len=seq_len)
    matched = other.model_copy(update={"intermediate_size": size})
    pairs = {
        "parameters": (base.num_params(), matched.num_params(), other.num_params()),
        "flops": tuple(m.flops_per_token(seq_len) for m in (base, matched, other)),
    }
    aim, found, before = pairs[what]
    assert abs(found / aim - 1) < 0.002 < 0.02 < before / aim - 1
    with pytest.raises(ConfigError, match="has no MLP"):
        matched_size(base, model_config("mamba2_340m"), what=what, seq_len=seq_len)


def test_a_matched_comparison_trains_the_matched_model(compare, tmp_path):
    words = ["base=gdn", "other=pgdn", "seeds=2", "rates=2e-3", "match=parameters"]
    assert "pgdn: model.intermediate_size=" in compare(*words)
    recorded = {
        file.name.partition("-")[0]: [w for w in json.loads(file.read_text()) if "interm" in w]
        for file in (tmp_path / "runs").glob("*.words.json")
    }
    assert recorded["gdn"] == [] and len(recorded["pgdn"]) == 1
