"""One file about several runs: what it holds, and that a browser shows it without an error."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pdn.errors import ConfigError
from pdn.reports import maps, report
from pdn.reports.events import events
from pdn.reports.lineage import same_order
from tests.small_runs import train

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
OPTIONS = (
    "trainer.steps=4",
    "schedule.warmup_steps=1",
    "eval.every=2",
    "eval.batch_size=4",
    "eval.max_samples=4",
    "data.validation_fraction=0.2",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Make two runs with one order of samples, and one that continues the first in another."""
    home = tmp_path_factory.mktemp("report")
    for name, words in {
        "a": ["seed=1", "data.seed=1"],
        "b": ["seed=2", "data.seed=1", "optim.lr=1e-3", "trainer.telemetry_every=2"],
        "c": ["seed=3", f"init_from={home}/a/run"],
    }.items():
        train(home / name, "pgdn_tiny", *OPTIONS, *words)
    metrics = home / "a" / "run" / "metrics.jsonl"
    extra = {"evaluation/piqa/acc": 0.5, "evaluation/piqa/acc_stderr": 0.1}
    lines = [{"step": 4} | extra, {"step": 4, "evaluation/failed": 1, "loss": "nan"}]
    metrics.write_text(metrics.read_text() + "".join(json.dumps(line) + "\n" for line in lines))
    other = home / "b" / "run" / "metrics.jsonl"
    alarm = {"step": 4, "alarm/decay": "layer 1, head 0: the decay collapsed: half-life 0.2 tokens"}
    other.write_text(other.read_text() + json.dumps(alarm) + "\n")
    return {name: home / name / "run" for name in "abc"}


def content(page: str) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_a_report_holds_curves_results_events_differences_and_order(runs):
    found = content(report.build(runs))
    a = found["runs"][0]
    assert a["series"]["loss"][0] == [1, 2, 3, 4] and a["tokens"] == 8 * 48 and a["flops"] > 1e6
    assert a["hours"][1] == sorted(a["hours"][1]) and a["hours"][0] == [0, 1, 2, 3, 4]
    assert [point for point in a["curves"]["validation/loss_by_position"][0]] == [16, 48]
    assert {(event["kind"], event["step"]) for event in a["events"]} == {
        ("launch", 0),
        ("failure", 4),
    }
    (result,) = found["results"]
    assert (result["key"], result["values"]) == ("piqa/acc", [0.5, None, None])
    assert result["errors"] == [0.1, None, None]
    assert ["optim.lr", "0.002", "0.001", "0.002"] in found["differences"]
    assert found["order"] == [
        "a and b: the same samples in all 4 common steps",
        "c against a: the same samples at no step of 4",
    ]
    about = dict(found["runs"][2]["about"])
    assert about["loss, last 100"].endswith("(of 4)")  # the run has no more
    assert about["weights from"] == "a ← initialisation"
    assert "validation/tokens" not in found["charts"]["series"]  # it never changes


def test_a_branch_names_its_parent_and_has_seen_what_that_had(runs, tmp_path):
    branch = tmp_path / "branch"
    shutil.copytree(runs["a"], branch)
    lines = [json.loads(line) for line in (runs["a"] / "ledger.jsonl").read_text().splitlines()]
    at = next(line for line in lines if line["step"] == 2)
    joint = at | {"first": at["end"], "parent": {"run": str(runs["a"]), "changes": {}}}
    own = [line for line in lines if line["step"] > 2]
    for samples, said in {
        "the same": "a and branch: the same samples in all 4 common steps",
        "others": "branch against a: the same samples up to step 2 of 4",
    }.items():
        changed = own if samples == "the same" else [line | {"hash": samples} for line in own]
        text = "".join(json.dumps(line) + "\n" for line in [joint, *changed])
        (branch / "ledger.jsonl").write_text(text)
        assert same_order({"a": runs["a"], "branch": branch}) == [said]
    found = content(report.build({"a": runs["a"], "branch": branch}))
    about = dict(found["runs"][1]["about"])
    assert about["weights from"] == "a@2 ← initialisation"
    assert found["runs"][1]["events"][0]["text"].startswith("branched from a@2 on 1 × ")
    (branch / "ledger.jsonl").write_text(text.replace(str(runs["a"]), "/gone/run"))
    (alone,) = content(report.build({"branch": branch}))["runs"]
    assert dict(alone["about"])["weights from"] == "/gone/run@2"


def test_a_run_that_failed_says_why(runs, tmp_path):
    shutil.copytree(runs["a"], tmp_path / "run")
    status = {"state": "failed", "step": 3, "reason": "pdn[E-X] why"}
    (tmp_path / "run" / "status.json").write_text(json.dumps(status))
    (run,) = content(report.build({"run": tmp_path / "run"}))["runs"]
    assert {"step": 3, "kind": "failure", "text": "ended: pdn[E-X] why"} in run["events"]


def test_of_what_happens_very_often_the_first_are_told_and_how_many_more(tmp_path):
    slow = [{"step": step, "pace/alarm": f"step {step} took 9 s"} for step in range(1, 101)]
    collapsed = {"step": 90, "alarm/decay": "layer 1, head 0: the decay collapsed"}
    found = events(tmp_path, sorted([*slow, collapsed], key=lambda r: r["step"]), {})
    assert [event["step"] for event in found] == [*range(1, 21), 90, 100]
    assert found[-1]["text"] == (
        "80 more of these, the last at this step: pace/alarm: step 100 took 9 s"
    )


def test_telemetry_is_drawn_by_layer_and_head_with_its_alarms(runs, tmp_path):
    b = content(report.build(runs))["runs"][1]
    life = b["maps"]["half_life_p90"]
    assert life["rows"] == ["0.0", "0.1", "1.0", "1.1"] and life["steps"] == [2, 4]
    assert life["alarms"] == [[4, "1.0"]] and b["maps"]["S_norm"]["alarms"] == []
    assert [event["step"] for event in b["events"] if event["kind"] == "alarm"] == [4]
    assert "gradient/matrices" in b["series"]
    assert not any(key.startswith("telemetry/") for key in b["series"])
    lines = [{"step": 2 * i, "maps": {"S_norm": [[float(i), None], None]}} for i in range(300)]
    (tmp_path / "telemetry.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    many = maps.telemetry(tmp_path, [])["S_norm"]
    assert len(many["steps"]) == 100 and many["steps"][-1] == 598
    assert many["values"][0][0] == 1.0 and many["values"][1] == [None] * 100


def test_a_report_needs_no_network_and_ends_no_script_early(runs, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copytree(runs["a"], tmp_path / "run", dirs_exist_ok=True)
    page = report.build({"</script><b>": tmp_path / "run"})
    assert page.count("</script>") == 2 and not re.search(r"(src|href)=\"(?!data:)", page)
    assert "https://" not in page


def test_one_mixer_of_each_run_is_compared_whatever_its_name():
    def config(name: str, **mixer) -> dict:
        return {"model": {"name": name, "mixers": {name: {"conv_size": 4} | mixer}}}

    found = report.differences({"a": config("gdn"), "b": config("pgdn", bound=1.5)})
    assert found == [["model.mixers.*.bound", "–", "1.5"], ["model.name", '"gdn"', '"pgdn"']]
    hybrid = {"model": {"name": "gdn", "mixers": {"gdn": {}, "attention": {"conv_size": 4}}}}
    found = report.differences({"a": config("gdn"), "b": hybrid})
    assert ["model.mixers.gdn.conv_size", "4", "–"] in found


def test_of_many_runs_the_title_is_their_number_and_those_of_one_order_are_one_line(runs):
    page = report.build({f"run{i}": runs["ab"[i % 2]] for i in range(4)})
    assert "<title>4 runs</title>" in page
    assert content(page)["order"] == [
        "run0, run1, run2 and run3: the same samples in all 4 common steps"
    ]


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_draws_every_chart_over_every_axis_without_an_error(runs, tmp_path):
    louder = tmp_path / "louder"
    shutil.copytree(runs["b"], louder)
    file = louder / "telemetry.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        line["maps"]["S_norm"] = [[9 * x for x in row] for row in line["maps"]["S_norm"]]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = report.build({**runs, "louder": louder})
    watch = "<script>window.faults = []; onerror = (m) => faults.push(m);</script>"
    drive = """<script>
      for (const value of ["step", "hours", "flops", "tokens"]) {
        const axis = document.querySelector("select");
        axis.value = value;
        axis.dispatchEvent(new Event("change"));
      }
      for (const box of document.querySelectorAll("input[type=checkbox]")) box.click();
      for (const box of document.querySelectorAll("input[type=checkbox]")) box.click();
      for (const svg of document.querySelectorAll("svg"))
        svg.dispatchEvent(new PointerEvent("pointermove", {clientX: 200, clientY: 100}));
      const paths = [...document.querySelectorAll("path")];
      const bad = paths.filter((p) => /NaN|Infinity/.test(p.getAttribute("d")));
      const folds = [...document.querySelectorAll("details")];
      const norms = folds.find((each) => each.innerHTML.includes("‖S‖"));
      const scales = [...norms.querySelectorAll("text")].filter((t) => /blue/.test(t.textContent));
      const told = document.querySelectorAll("svg")[0].parentNode.querySelectorAll("output div");
      const alike = new Set(scales.map((t) => t.textContent)).size;
      document.title = `faults ${faults.length + bad.length} paths ${paths.length} `
        + `told ${told.length} maps ${scales.length} scales ${alike}`;
    </script>"""
    file = tmp_path / "report.html"
    file.write_text(page.replace("<main", watch + "<main").replace("</html>", drive + "</html>"))
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=3000",
            "--dump-dom",
            file.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search(r"<title>faults (\d+) paths (\d+) (told .*?)<", done.stdout)
    assert found and found[1] == "0" and int(found[2]) > 20
    # every run has a line at the pointer; the maps of one quantity have the same colours
    assert found[3] == "told 4 maps 2 scales 1"
    assert "CONSOLE" not in done.stderr


def test_what_is_no_run_is_refused(runs, tmp_path):
    with pytest.raises(ConfigError, match=r"metrics\.jsonl"):
        report.build({"x": tmp_path})
    with pytest.raises(ConfigError, match=r"ends in \.html"):
        report.write(runs, tmp_path / "report.pdf")
