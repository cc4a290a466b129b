"""Which runs the words of a command name."""

import pytest

from pdn.errors import ConfigError
from pdn.reports.chosen import named, only_runs


@pytest.fixture
def sweep(tmp_path):
    """Make a directory of two runs, one without metrics yet, and what a sweep leaves beside."""
    for name in ("a", "b", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("")
        if name != "new":
            (tmp_path / name / "metrics.jsonl").write_text("{}")
        (tmp_path / f"{name}.log").write_text("")
    return tmp_path


def test_what_a_sweep_leaves_beside_its_runs_is_passed_over_in_one_line(sweep, capsys):
    assert only_runs(sorted(sweep.iterdir())) == [sweep / "a", sweep / "b"]
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith("left out, no metrics.jsonl: ") and said.endswith("new and 1 more")
    with pytest.raises(ConfigError, match="no run among them; expected directories with metrics"):
        only_runs([sweep / "a.log", sweep / "new"])


def test_a_directory_of_runs_stands_for_its_runs(sweep, capsys):
    assert only_runs([sweep]) == [sweep / "a", sweep / "b"]
    assert capsys.readouterr().out == ""
    absent = sweep / "absent"
    assert only_runs([sweep / "b", absent]) == [sweep / "b", absent]  # for its reader to refuse


def test_runs_are_called_by_the_shortest_end_that_tells_them_apart(tmp_path):
    paths = [tmp_path / "x" / "run", tmp_path / "y" / "run", tmp_path / "x" / "run"]
    assert list(named(paths)) == ["x/run", "y/run"]


def test_what_long_names_have_in_common_at_both_ends_is_left_out(tmp_path):
    start, end = "pgdn-340m-slimpajama-lr", "-and-much-more"
    long = [tmp_path / f"{start}{own}{end}" for own in ("1e-3-s1", "1e-3-s2", "4e-3-s1")]
    assert list(named(long)) == ["…lr1e-3-s1…", "…lr1e-3-s2…", "…lr4e-3-s1…"]
    assert list(named(long[:2])) == ["…s1…", "…s2…"]
    assert list(named(long[:1])) == [long[0].name]
    rates = [tmp_path / f"{start}{rate}{end}" for rate in ("1e-3", "1e-4")]
    assert list(named(rates)) == ["…lr1e-3…", "…lr1e-4…"]  # a number is one part
    assert list(named([long[0], tmp_path / "more"])) == [long[0].name, "more"]  # of each some part
    within = [tmp_path / f"{start}1{end}", tmp_path / f"{start}1{end}-longer"]
    assert list(named(within)) == ["…more", "…more-longer"]
    assert list(named([tmp_path / "gdn-s1", tmp_path / "gdn-s2"])) == ["gdn-s1", "gdn-s2"]
