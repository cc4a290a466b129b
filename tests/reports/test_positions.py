"""Studies whose arms branch from each other and are compared position by position."""

import functools
import math

import pytest
import yaml

import scripts.evidence
from pdn.errors import ConfigError
from pdn.reports import document, positions
from pdn.reports.evidence import Study, final_results, read_study, record_of, write_records
from pdn.reports.trials import run_trials

KEY = "evaluation/positions/loss"
STUDY = {
    "title": "a study",
    "words": ["by_position=1"],
    "metric": KEY,
    "baseline": "gdn",
    "arms": {
        "gdn": {"words": ["model=gdn_tiny"]},
        "longer": {
            "words": ["model=gdn_tiny", "order=b"],
            "branch": {"arm": "gdn", "step": 1},
            "order": "long",
        },
    },
    "rates": [1e-3],
    "search_seeds": [100],
    "seeds": [1, 2, 3],
    "data_seed": 7,
    "positions": {
        "GDN": {
            "reset": {"arm": "gdn", "key": "evaluation/positions/reset_loss"},
            "longer": {"arm": "longer", "key": KEY},
        }
    },
}


def run(study: Study, directory, command, recorded: list[dict]) -> tuple[list[dict], list[str]]:
    """Run what is ready until nothing is; return the records, and what was launched, in order."""
    records, said = list(recorded), []

    def ready(finished):
        names = {record["trial"] for record in records}
        return study.ready(study.trials({"gdn": 1e-3}, directory), names, directory)[0]

    def on_finished(trial, path):
        arm = study.arm_of(trial.name)
        records.append(record_of(path, arm=arm, trial=trial.name, device="stub"))

    run_trials(
        ready, directory, slots=2, seconds=None, command=command, say=said.append,
        on_finished=on_finished,
    )  # fmt: skip
    return records, [line.split()[-1] for line in said if " start " in line]


@pytest.fixture(scope="module")
def study() -> Study:
    return Study.model_validate(STUDY)


@pytest.fixture(scope="module")
def finished(study, command, tmp_path_factory) -> list[dict]:
    return run(study, tmp_path_factory.mktemp("runs"), command, [])[0]


@pytest.fixture
def records(finished) -> list[dict]:
    return finished


def test_a_branch_waits_for_its_parent_and_goes_on_from_that_of_its_seed(study, tmp_path):
    trials = study.trials({"gdn": 1e-3}, tmp_path)
    trunks = [trial.name for trial in trials if study.parent(trial) is None]
    branches = [trial.name for trial in trials if study.parent(trial) is not None]
    assert len(trunks) == len(branches) == 3

    def ready(recorded=()) -> tuple[list[str], list[str]]:
        found, waiting = study.ready(trials, recorded, tmp_path)
        return [trial.name for trial in found], waiting

    assert ready() == (trunks, branches)
    (tmp_path / trunks[1]).mkdir()
    (tmp_path / trunks[1] / "status.json").write_text('{"state": "finished"}')
    assert ready() == ([*trunks[:2], branches[1], trunks[2]], [branches[0], branches[2]])
    assert ready([trunks[1]]) == ([trunks[0], branches[1], trunks[2]], [branches[0], branches[2]])
    for trial in trials:
        parent = study.parent(trial)
        seed = trial.name.rpartition("-")[2]
        assert parent is None or parent == f"gdn-lr0.001-{seed}"
        assert parent is None or trial.words[-1] == f"branch_from={tmp_path / parent}@1"


def test_a_sweep_runs_parents_and_then_their_branches(finished):
    done = [record["trial"] for record in finished]
    assert len(done) == 6
    for seed in (1, 2, 3):
        trunk, branch = (f"{arm}-lr0.001-seed{seed}" for arm in ("gdn", "longer"))
        assert done.index(trunk) < done.index(branch)


def test_of_a_branch_only_its_own_steps_count_as_its_time(records):
    # the stand-in takes half a second a step, two steps
    assert {(r["arm"], r["train_seconds"]) for r in records} == {("gdn", 1.0), ("longer", 0.5)}


def test_what_is_recorded_is_not_run_again_but_a_parent_whose_run_is_gone(
    study, records, command, tmp_path
):
    def less(*trials: str) -> list[dict]:
        return [r for r in records if r["trial"] not in trials]

    assert run(study, tmp_path / "a", command, records)[1] == []  # nothing happens
    gone = "longer-lr0.001-seed2"
    assert run(study, tmp_path / "b", command, less(gone))[1] == ["gdn-lr0.001-seed2", gone]
    trials = study.trials({"gdn": 1e-3}, tmp_path / "c")
    ready, waiting = study.ready(trials, {r["trial"] for r in less(gone)}, tmp_path / "c")
    assert ([t.name for t in ready], waiting) == (["gdn-lr0.001-seed2"], [gone])


def test_orders_may_differ_between_arms_that_say_so_alone(study, records):
    assert set(final_results(study, records)) == {"gdn", "longer"}
    one = study.model_copy(
        update={"arms": {n: a.model_copy(update={"order": ""}) for n, a in study.arms.items()}}
    )
    with pytest.raises(ConfigError, match="same samples in the same order"):
        final_results(one, records)
    fewer = [r | {"tokens": 8} if r["arm"] == "longer" else r for r in records]
    with pytest.raises(ConfigError, match="different numbers of tokens: longer, seed 3: 8"):
        final_results(study, fewer)


def test_lines_are_compared_with_the_first_seed_by_seed(study, records):
    reset, longer = positions.curves_of(study, records)["GDN"].values()
    assert reset.ends == longer.ends == [4, 16]
    assert reset.differences == [None, None]
    # of the stand-in: branches are 0.02 better at the start and 0.5 further on, resets 0.1 worse
    assert reset.means == pytest.approx([3.22, 3.22])
    for difference, expected in zip(longer.differences, (-0.12, -0.6), strict=True):
        assert difference.n == 3 and difference.mean == pytest.approx(expected)
        assert difference.sd == pytest.approx(0, abs=1e-9)


def test_the_table_and_the_picture_follow_from_the_records(study, records, tmp_path):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "evidence"
    folder.mkdir()
    (folder / "small.yaml").write_text(yaml.safe_dump(STUDY, sort_keys=False))
    template = "{{ by_position small GDN }}\n{{ plot small }}"
    (folder / "evidence.md.in").write_text(template)
    assert document.render(tmp_path) == "not run\nNo picture yet: not run."
    write_records(folder / "small.jsonl", records)
    assert document.render(tmp_path).splitlines() == [
        "| up to position | 4 | 16 |",
        "|---|---|---|",
        "| reset | 3.220 | 3.220 |",
        "| longer, minus that | −0.120 ± 0.000 | −0.600 ± 0.000 |",
        "![a study](evidence/small.png)",
    ]
    assert str(folder / "small.png") in document.write(tmp_path)
    assert (folder / "small.png").stat().st_size > 10_000
    (folder / "evidence.md.in").write_text("{{ between small GDN 16 longer - reset }}")
    assert document.render(tmp_path) == "−0.600 ± 0.000"
    with pytest.raises(ConfigError, match="no panel 'KDA'; panels: GDN"):
        positions.table(study, records, "KDA")
    with pytest.raises(ConfigError, match="no line 'shorter'; lines: reset, longer"):
        positions.between(study, records, "GDN", 16, "shorter", "reset")


def test_a_panel_is_told_by_its_own_labels_and_each_mean_with_its_least_and_largest_seed(
    study, records
):
    told = study.model_copy(update={"position_label": "letters", "value_label": "share"})
    assert positions.means(told, records, "GDN").splitlines() == [
        "| letters | 4 | 16 |",
        "|---|---|---|",
        "| reset | 3.220 (3.210–3.230) | 3.220 (3.210–3.230) |",
        "| longer | 3.100 (3.090–3.110) | 2.620 (2.610–2.630) |",
    ]
    assert positions.means(told, [], "GDN") == "not run"
    above, _ = positions.draw(told, records).axes
    assert (above.get_xlabel(), above.get_ylabel()) == ("letters", "share, mean over seeds")


def test_a_line_of_one_seed_has_no_interval_and_a_missing_one_is_left_out(study, records):
    one = [r for r in records if r["seed"] == 1]
    longer = positions.curves_of(study, one)["GDN"]["longer"]
    assert longer.differences == [None, None] and math.isfinite(longer.means[0])
    trunks = [r for r in records if r["arm"] == "gdn"]
    assert list(positions.curves_of(study, trunks)["GDN"]) == ["reset"]


def test_one_command_runs_the_study_and_another_goes_on_where_it_was_killed(
    command, tmp_path, monkeypatch, capsys
):
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(STUDY, sort_keys=False))
    monkeypatch.setattr(scripts.evidence, "STUDIES", tmp_path)
    monkeypatch.setattr(
        scripts.evidence, "run_trials", functools.partial(run_trials, command=command)
    )
    words = ["run=small", f"runs={tmp_path}/runs", "slots=2", "keep=false"]
    scripts.evidence.main(words)
    assert "6 trials finished, 0 failed, 0 left" in capsys.readouterr().out
    written = (tmp_path / "small.jsonl").read_text()
    assert len(written.splitlines()) == 6
    kept = {path.parent.name for path in (tmp_path / "runs" / "small").glob("*/checkpoints")}
    assert kept == {f"gdn-lr0.001-seed{seed}" for seed in (1, 2, 3)}  # which branches begin from
    # of the third branch nothing is left but half a run
    (tmp_path / "small.jsonl").write_text("".join(written.splitlines(keepends=True)[:-1]))
    (tmp_path / "runs" / "small" / "longer-lr0.001-seed3" / "status.json").unlink()
    scripts.evidence.main(words)
    assert "1 trial finished, 0 failed, 0 left" in capsys.readouterr().out
    assert (tmp_path / "small.jsonl").read_text() == written


@pytest.mark.parametrize(
    ("arm", "said"),
    [
        ({"branch": {"arm": "gnd", "step": 1}}, "'gnd' is not one of arms"),
        ({"branch": {"arm": "gdn", "step": 1}, "rates_of": "gdn"}, "a branch with rates_of"),
        ({"branch": {"arm": "longer", "step": 1}}, "or of another branch"),
    ],
)
def test_a_branch_of_nothing_or_of_a_branch_is_refused(arm, said, tmp_path):
    file = tmp_path / "study.yaml"
    arms = STUDY["arms"] | {"other": {"words": []} | arm}
    file.write_text(yaml.safe_dump(STUDY | {"arms": arms}))
    with pytest.raises(ConfigError, match=said):
        read_study(file)
