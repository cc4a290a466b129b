"""Studies: each arm at its own best rate, pairs on one order.

A document follows from the records.
"""

import json
import math
from pathlib import Path

import pytest
import yaml

from pdn.cli.compose import compose
from pdn.cli.parse import parse
from pdn.errors import ConfigError
from pdn.reports import document
from pdn.reports.compare import compare, lines
from pdn.reports.evidence import (
    Study,
    best_rates,
    final_results,
    paired,
    read_records,
    read_study,
    record_of,
    search_table,
    write_records,
)
from pdn.reports.statistics import rank_correlation
from pdn.reports.transfer import read_any
from pdn.reports.trials import run_trials

STUDY = {
    "title": "a study",
    "words": [],
    "metric": "validation/loss",
    "baseline": "gdn",
    "arms": {
        "gdn": {"words": ["model=gdn_tiny"]},
        "pgdn": {"words": ["model=pgdn_tiny"]},
        "control": {"words": ["model=gdn_tiny"], "rates_of": "gdn", "seeds": [1]},
    },
    "rates": [1e-3, 2e-3],
    "search_seeds": [100],
    "seeds": [1, 2, 3],
    "data_seed": 7,
}


def run(study: Study, directory, command) -> list[dict]:
    records: list[dict] = []
    run_trials(
        lambda finished: study.search_trials() + study.trials(best_rates(study, records)),
        directory,
        slots=2,
        seconds=None,
        command=command,
        say=lambda line: None,
        on_finished=lambda t, path: records.append(
            record_of(path, arm=study.arm_of(t.name), trial=t.name, device="stub")
        ),
    )
    return records


@pytest.fixture(scope="module")
def study() -> Study:
    return Study.model_validate(STUDY)


@pytest.fixture(scope="module")
def records(study, command, tmp_path_factory) -> list[dict]:
    return run(study, tmp_path_factory.mktemp("runs"), command)


def test_every_arm_searches_first_and_then_runs_all_seeds_at_its_best_rate(study, records):
    assert search_table(study, records) == {
        "gdn": {1e-3: pytest.approx(4.1), 2e-3: pytest.approx(4.0)},
        "pgdn": {1e-3: pytest.approx(3.999), 2e-3: pytest.approx(3.899)},
    }
    assert best_rates(study, records) == {"gdn": 2e-3, "pgdn": 2e-3}
    results = final_results(study, records)
    assert {arm: list(found) for arm, found in results.items()} == {
        "gdn": [1, 2, 3],
        "pgdn": [1, 2, 3],
        "control": [1],
    }
    assert len(records) == 4 + 7
    assert {record["data_seed"] for record in records} == {7}


def test_pairs_are_differences_of_the_same_seed(study, records):
    results = final_results(study, records)
    interval = paired(results["gdn"], results["pgdn"])
    assert interval.n == 3
    assert interval.mean == pytest.approx(-0.101)
    assert paired(results["gdn"], results["control"]) is None


def test_an_incomplete_search_has_no_best_rate(study, records):
    left_out = [r for r in records if (r["arm"], r["seed"], r["lr"]) != ("pgdn", 100, 1e-3)]
    assert best_rates(study, left_out) == {"gdn": 2e-3}
    two_seeds = study.model_copy(update={"search_seeds": [100, 101]})
    assert best_rates(two_seeds, records) == {}


def test_runs_in_another_order_are_not_compared(study, records):
    changed = [r | {"order": "other"} if r["seed"] == 2 else r for r in records]
    with pytest.raises(ConfigError, match="same samples in the same order"):
        final_results(study, changed)


def test_a_loss_that_is_not_finite_loses_the_search(study, records):
    diverged = {"evaluations": {"validation/loss": [[2, float("nan")]]}}
    changed = [r | diverged if (r["arm"], r["lr"]) == ("gdn", 1e-3) else r for r in records]
    assert search_table(study, changed)["gdn"][1e-3] == math.inf
    assert best_rates(study, changed)["gdn"] == 2e-3


@pytest.mark.parametrize(
    "evaluations",
    [
        {"validation/loss": [[1, 0.1]], "validation/failed": [[2, 1]]},
        {"validation/failed": [[2, 1]]},
    ],
    ids=["at the last step", "at every step"],
)
def test_an_evaluation_that_failed_is_no_result(study, records, evaluations):
    """An earlier value would be compared with those that others have at their end."""
    changed = [
        r | {"evaluations": evaluations} if (r["arm"], r["lr"]) == ("gdn", 1e-3) else r
        for r in records
    ]
    with pytest.raises(ConfigError, match=r"was not measured after step 2.*validation/failed"):
        best_rates(study, changed)
    with pytest.raises(ConfigError, match="was not measured after step 2"):
        compare(
            side(records, "gdn"),
            [r | {"evaluations": {"validation/loss": [[1, 0.1]]}} for r in side(records, "pgdn")],
            "validation/loss",
        )


def test_records_survive_a_file_in_a_fixed_order(records, tmp_path):
    write_records(tmp_path / "a.jsonl", records)
    write_records(tmp_path / "b.jsonl", list(reversed(records)))
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert len(read_records(tmp_path / "a.jsonl")) == len(records)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"baseline": "gnd"}, "'gnd' is not one of arms"),
        ({"seeds": [1, 100]}, "share some"),
        ({"rates": [-1.0]}, "rates"),
        ({"arm": {}}, "arm: Extra inputs"),
    ],
)
def test_a_wrong_study_is_refused_by_its_key(change, said, tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(STUDY | change))
    with pytest.raises(ConfigError, match=said):
        read_study(file)


# ------------------------------------------------------------ compare


def side(records: list[dict], arm: str) -> list[dict]:
    return [r for r in records if r["arm"] == arm and r["seed"] != 100]


def test_a_comparison_says_the_difference_the_verdict_and_the_pairs_needed(records):
    found = compare(side(records, "gdn"), side(records, "pgdn"), "validation/loss")
    text = "\n".join(lines(found, base="gdn", other="pgdn", metric="validation/loss", effect=0.01))
    assert "n = 3 pairs" in text
    assert "verdict: pgdn is better" in text
    assert "one of 0.01 needs" in text
    assert "not matched" not in text


def test_models_of_other_sizes_are_named(records):
    larger = [r | {"parameters": 2 * r["parameters"]} for r in side(records, "pgdn")]
    found = compare(side(records, "gdn"), larger, "validation/loss")
    assert any(
        "2.000 times the parameters" in line
        for line in lines(found, base="a", other="b", metric="m", effect=1)
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 9}, "none in common"),
        ({"steps": 3}, "steps differs"),
        ({"order": "x"}, "same samples in the same order"),
        ({"evaluations": {"validation/bits": [[2, 1.0]]}}, "expected one of validation/bits"),
    ],
)
def test_runs_that_cannot_be_paired_are_refused(records, change, said):
    others = [r | change for r in side(records, "pgdn")[:1]]
    with pytest.raises(ConfigError, match=said):
        compare(side(records, "gdn"), others, "validation/loss")


def test_a_seed_twice_is_refused(records):
    with pytest.raises(ConfigError, match="both have seed"):
        compare(side(records, "gdn") * 2, side(records, "pgdn"), "validation/loss")


# ------------------------------------------------------------ the document


@pytest.fixture
def docs(tmp_path, records):
    folder = tmp_path / "evidence"
    folder.mkdir()
    (folder / "small.yaml").write_text(yaml.safe_dump(STUDY))
    write_records(folder / "small.jsonl", records)
    (folder / "evidence.md.in").write_text(
        "{{ diff small pgdn gdn }}; {{ says small pgdn gdn }}; {{ needed small pgdn gdn }}\n"
        "{{ cost small }}\n{{ search small }}\n{{ table small }}\n{{ by_seed small }}\n"
        "{{ seed_spread small gdn }} {{ diff small control gdn }} {{ inside small gdn beta }}\n"
    )
    return tmp_path


def test_the_document_follows_from_the_records(docs):
    text = document.render(docs)
    assert text.startswith("−0.1010 [−0.10")
    assert "n = 3; better; 2" in text
    assert "| gdn | 4.1000 | **4.0000** |" in text
    assert "not run unknown" in text
    assert "{{" not in text


def test_pairs_of_several_studies_are_pooled(docs):
    (docs / "evidence" / "other.yaml").write_text(yaml.safe_dump(STUDY))
    written = (docs / "evidence" / "small.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in written]
    for row in rows:  # half as good as the first study's
        if row["arm"] == "pgdn":
            row["evaluations"]["validation/loss"][-1][1] += 0.05
    write_records(docs / "evidence" / "other.jsonl", rows)
    (docs / "evidence" / "evidence.md.in").write_text("{{ pooled small:pgdn:gdn other:pgdn:gdn }}")
    text = document.render(docs)
    assert text.startswith("−0.0760 [−0.10") and text.endswith("n = 6")


def test_a_metric_of_the_search_is_shown_after_the_steps_asked_for(docs):
    (docs / "evidence" / "evidence.md.in").write_text(
        "{{ search_at small validation/loss 2 999 }}\n{{ search_at small none 2 }}"
    )
    lines = document.render(docs).splitlines()
    assert lines[0] == "| arm | lr | step 2 | step 999 |"
    assert lines[2] == "| gdn | 0.001 | 4.100 | – |"
    assert lines[-2] == "| arm | lr | step 2 |"  # nothing has it


def test_another_metric_is_shown_for_every_seed_of_the_comparison(docs):
    file = docs / "evidence" / "small.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        row["evaluations"]["accuracy"] = [[1, row["seed"] / 8], [2, 1.0]]
    write_records(file, rows)
    (docs / "evidence" / "evidence.md.in").write_text(
        "{{ by_seed small accuracy 1 }}\n{{ by_seed small accuracy 3 }}"
    )
    lines = document.render(docs).splitlines()
    assert lines[0] == "| arm | seed 1 | seed 2 | seed 3 |"
    assert "| gdn | 0.125 | 0.250 | 0.375 |" in lines[: len(lines) // 2]
    assert lines[-1].endswith("| – | – | – |")


def test_a_rank_correlation_sees_order_alone_and_shares_ranks(docs, records):
    assert rank_correlation([3.0, 1.0, 1.0], [90.0, 2.0, 2.0]) == pytest.approx(1)
    rows = [
        r | {"internals": [{"layer": 0, "decay": 1 / r["evaluations"]["validation/loss"][-1][1]}]}
        for r in records
    ]
    write_records(docs / "evidence" / "small.jsonl", rows)
    (docs / "evidence" / "evidence.md.in").write_text("{{ correlation small decay 0 }}")
    assert document.render(docs) == "−1.00 (7 runs)"


def test_a_changed_record_makes_the_document_stale(docs):
    assert document.stale_files(docs) == [str(docs / "evidence.md")]
    (docs / "evidence.md").write_text(document.render(docs))
    assert document.stale_files(docs) == []
    file = docs / "evidence" / "small.jsonl"
    file.write_text(file.read_text().replace("2.909", "2.95"))
    assert document.stale_files(docs) == [str(docs / "evidence.md")]


def test_an_unknown_placeholder_or_arm_is_named(docs):
    template = docs / "evidence" / "evidence.md.in"
    for text, said in (
        ("{{ dif small a b }}", "name one of"),
        ("{{ diff small pgdm gdn }}", "no arm 'pgdm'"),
    ):
        template.write_text(text)
        with pytest.raises(ConfigError, match=said):
            document.render(docs)


def test_a_study_has_a_picture(docs):
    pytest.importorskip("matplotlib")
    written = document.write(docs)
    assert str(docs / "evidence" / "small.png") in written
    assert (docs / "evidence" / "small.png").stat().st_size > 10_000


def test_the_shipped_document_follows_from_the_shipped_records():
    docs = Path(__file__).parents[2] / "docs"
    assert document.stale_files(docs) == []


STUDIES = sorted((Path(__file__).parents[2] / "docs" / "evidence").glob("*.yaml"))


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_every_shipped_study_composes_and_parses(file):
    study = read_any(file)
    if isinstance(study, Study):
        trials = [study.trial(arm, study.rates[0], study.seeds[0]) for arm in study.arms]
    else:
        trials = study.due([])[:: len(study.rates) * 4]
    for trial in trials:
        config = parse(compose(trial.words))
        assert (config.seed, config.data_seed) == (study.seeds[0], study.data_seed)
        # that of the presets rose after most had run
        declared = [word for word in trial.words if word.startswith("optim.groups.embeddings")]
        scale = float(declared[0].partition("=")[2]) if declared else 1.0
        assert config.optim.groups.embeddings.lr_scale == scale
