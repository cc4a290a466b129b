"""Suites and tasks by name, the errors in their files, and what results say."""

import json
import os
import re
import shutil

import httpx
import pytest
import torch

from pdn.data.codec import open_codec
from pdn.distributed.fsdp import World
from pdn.errors import ConfigError, DataError, StorageError
from pdn.evals.evaluation import prepare, run
from pdn.evals.results import record
from pdn.evals.scoring import Scorer
from pdn.evals.suites import CONFIGS, Loaded, load_suite, plan, stock_tasks, suites
from tests.evals.subjects import FIXTURES, model_of, multiple_choice, subject
from tests.ranks import run_ranks

pytestmark = pytest.mark.usefixtures("offline")


def test_every_suite_is_one_whose_tasks_exist():
    for name in suites():
        suite = load_suite(name)
        probes = {path.stem for path in (CONFIGS / "tasks").glob("*.yaml")}
        assert set(suite.tasks) <= probes | set(stock_tasks())
        for members in suite.averages.values():
            assert set(members) <= set(suite.tasks)
        if suite.paper is not None:
            assert all(len(row) == len(suite.paper.columns) for row in suite.paper.rows.values())


def test_wrong_names_are_answered_with_the_nearest():
    with pytest.raises(ConfigError, match=r"lambada_opnai.*did you mean lambada_openai"):
        plan(suite=None, tasks=["lambada_opnai"], data_dir=None)
    with pytest.raises(ConfigError, match=r"needel_1.*did you mean needle_1"):
        plan(suite=None, tasks=["needel_1"], data_dir=None)
    with pytest.raises(ConfigError, match=r"comonsense.*did you mean commonsense"):
        plan(suite="comonsense", tasks=[], data_dir=None)
    with pytest.raises(ConfigError, match="no task named; expected suite=commonsense"):
        plan(suite=None, tasks=[], data_dir=None)


def test_missing_data_are_named(tmp_path):
    with pytest.raises(ConfigError, match="data_dir=/nowhere: no such folder"):
        plan(suite=None, tasks=["piqa"], data_dir="/nowhere")
    with pytest.raises(ConfigError, match=r"piqa: no file .*piqa_val\.jsonl\.gz"):
        plan(suite=None, tasks=["piqa"], data_dir=str(tmp_path))
    with pytest.raises(ConfigError, match=r"squad_answers: no file"):
        plan(suite=None, tasks=["squad_answers"], data_dir=None)


def test_a_task_whose_data_cannot_be_fetched_says_so_and_the_others_run(tokenizer, hub, tmp_path):
    shutil.copytree(hub / "allenai", tmp_path / "allenai")
    chosen = plan(suite=None, tasks=["hellaswag", "sciq", "fda"], data_dir=str(tmp_path))
    outcome = run(chosen, subject(model_of("pgdn_tiny"), tokenizer), limit=1)
    assert {row.task for row in outcome.rows} == {"sciq"}
    assert outcome.missing.keys() == {"hellaswag", "fda"}
    with pytest.raises(StorageError) as caught:
        outcome.check_complete()
    for part in ("hellaswag", "Rowan/hellaswag", f"--local-dir {tmp_path}/hazyresearch/based-fda"):
        assert part in str(caught.value)


def test_a_damaged_local_file_is_named(tokenizer, tmp_path):
    (tmp_path / "piqa_val.jsonl.gz").write_bytes(b"not gzip")
    outcome = run(
        plan(suite=None, tasks=["piqa"], data_dir=str(tmp_path)),
        subject(model_of("pgdn_tiny"), tokenizer),
        limit=1,
    )
    assert not outcome.rows and re.search(
        r"piqa: .*piqa_val\.jsonl\.gz cannot be loaded.*expected JSON lines",
        outcome.missing["piqa"],
    )


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (ConnectionError("no route"), "cannot be reached (ConnectionError: no route)"),
        (
            httpx.HTTPStatusError("429", request=None, response=httpx.Response(429)),
            "answers HTTP 429 (Too Many Requests): it is busy, try again later",
        ),
    ],
)
def test_a_hub_that_gives_nothing_is_asked_once_and_the_client_not_left_to_retry(
    failure, said, monkeypatch
):
    import datasets
    import huggingface_hub

    from pdn.evals.tasks import load_tasks

    asked, loaded, lines = [], [], []

    def dataset_info(self, name, timeout):
        asked.append((name, timeout))
        raise failure

    def load_dataset(path, *args, **kwargs):
        loaded.append((path, huggingface_hub.constants.HF_HUB_OFFLINE))
        raise ConnectionError("Couldn't reach it (OfflineModeIsEnabled)")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    chosen = plan(suite=None, tasks=["sciq", "fda"], data_dir=None)
    missing = load_tasks(chosen, {}, tell=lines.append).missing
    assert asked == [("allenai/sciq", 10.0)]
    assert loaded == [("allenai/sciq", True), ("hazyresearch/based-fda", True)]
    assert lines == [f"the hub {said}: only what is cached is used"]
    assert missing.keys() == {"sciq", "fda"}
    for reason in missing.values():
        assert f"(the hub {said})" in reason
        assert "Offline" not in reason  # the reader has not asked for that
    assert (
        huggingface_hub.constants.HF_HUB_OFFLINE is False and datasets.load_dataset is load_dataset
    )


def test_what_is_waited_for_is_said_before_it_is_loaded(tokenizer, monkeypatch):
    import pdn.evals.tasks

    lines = []

    def load_tasks(plan, metadata, shots, tell):
        assert len(lines) == 1 and "loading 2 of lm-eval's (sciq, fda)" in lines[0]
        return Loaded({}, {})

    monkeypatch.setattr(pdn.evals.tasks, "load_tasks", load_tasks)
    chosen = plan(suite=None, tasks=["sciq", "fda"], data_dir=None)
    prepare(chosen, subject(model_of("pgdn_tiny"), tokenizer), lines.append)
    assert lines


def test_a_task_of_ones_own_runs_from_the_file_beside_its_yaml(tokenizer, tmp_path):
    (tmp_path / "facts.jsonl").write_text(
        "\n".join(json.dumps({"q": f"{i} + 1 =", "a": str(i + 1)}) for i in range(5))
    )
    (tmp_path / "facts.yaml").write_text(
        "task: facts\ndataset_path: json\ndataset_kwargs: {data_files: {test: "
        "facts.jsonl}}\ntest_split: test\n"
        "output_type: loglikelihood\ndoc_to_text: '{{q}}'\ndoc_to_target: ' {{a}}'\n"
        "metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}]\n"
    )
    chosen = plan(suite=None, tasks=[str(tmp_path / "facts.yaml")], data_dir=None)
    (row,) = run(chosen, subject(model_of("pgdn_tiny"), tokenizer), limit=3).rows
    assert row.task == "facts" and row.metric == "perplexity" and row.value > 1


def test_an_answer_that_does_not_fit_into_what_the_model_sees_fails_its_task_and_no_other(
    tokenizer,
):
    outcome = run(
        plan(suite=None, tasks=["piqa", "squad_answers", "wikitext"], data_dir=str(FIXTURES)),
        subject(model_of("pgdn_tiny"), tokenizer, max_length=20),
        limit=1,
    )
    assert {row.task for row in outcome.rows} == {"wikitext"}
    assert re.search(
        r"piqa: document 0: an answer has \d+ tokens, and max_length = 20; expected room",
        outcome.failed["piqa"],
    )
    assert "max_length = 20: the task generates 48 tokens" in outcome.failed["squad_answers"]
    with pytest.raises(DataError, match=r"tasks that failed: 2\n  piqa: .*\n  squad_answers"):
        outcome.check_complete()


GOOD = {"q": "The king", "choices": [" sea", " ship"], "gold": 0}


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"choices": ["", " ship"]}, r"document 3: the answer '' has no tokens"),
        ({"q": "", "choices": ["", " ship"]}, r"document 3: the answer '' has no tokens"),
        ({"choices": []}, r"document 3: \w+"),
        ({"gold": 2}, "document 3: ValueError: the right answer, 2, is none of the 2 choices"),
        ({"gold": -1}, "document 3: ValueError: the right answer, '-1', is none"),
        ({"gold": None}, "document 3: ValueError: the right answer, 'None', is none"),
        ({"gold": "x"}, "document 3: ValueError: the right answer, 'x', is none"),
    ],
)
def test_a_document_that_cannot_be_evaluated_is_named(bad, said, tokenizer, tmp_path):
    task = multiple_choice(tmp_path, [GOOD, GOOD, GOOD, GOOD | bad, GOOD])
    outcome = run(
        plan(suite=None, tasks=[task], data_dir=None),
        subject(model_of("pgdn_tiny"), tokenizer),
        limit=None,
    )
    assert not outcome.rows and re.search(f"choices: {said}", outcome.failed["choices"])


def test_results_carry_their_number_standard_error_and_conditions(tokenizer):
    chosen = plan(suite=None, tasks=["piqa", "lambada_openai"], data_dir=str(FIXTURES))
    outcome = run(
        chosen, subject(model_of("pgdn_tiny"), tokenizer, max_length=128), limit=6, samples=2
    )
    by_metric = {(row.task, row.metric): row for row in outcome.rows}
    accuracy = by_metric["piqa", "acc"]
    assert accuracy.n == 6 and accuracy.condition == "limit=6,max_length=128"
    assert accuracy.stderr == pytest.approx(
        (accuracy.value * (1 - accuracy.value) / 5) ** 0.5, abs=1e-12
    )
    assert by_metric["lambada_openai", "perplexity"].stderr > 0
    keys = record(outcome.rows)
    assert keys["evaluation/piqa[limit=6,max_length=128]/acc"] == accuracy.value
    assert keys["evaluation/piqa[limit=6,max_length=128]/acc_stderr"] == accuracy.stderr
    about = outcome.about["piqa"]
    assert (about["n"], about["shots"], about["limit"]) == (6, 0, 6) and about["documents"] > 6
    assert about["lm_eval"] and about["task_version"] is not None
    assert [sample["doc_id"] for sample in outcome.samples if sample["task"] == "piqa"] == [0, 1]
    assert "Question:" in outcome.samples[0]["arguments"][0][0]


def test_a_limit_that_leaves_nothing_out_is_no_condition(tokenizer):
    chosen = plan(suite=None, tasks=["piqa"], data_dir=str(FIXTURES))
    (row, *_) = run(chosen, subject(model_of("pgdn_tiny"), tokenizer), limit=10**6).rows
    assert row.condition == "" and row.label == "piqa"


def test_standard_errors_are_those_of_lm_eval(tokenizer, monkeypatch):
    import lm_eval.api.metrics
    from lm_eval.api.metrics import bootstrap_stderr, perplexity

    from pdn.evals.harness import _plain_bootstrap

    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    values = [-3.0, -1.5, -7.25, -0.5, -2.0]
    theirs = bootstrap_stderr(perplexity, values, 1000)
    with _plain_bootstrap():
        ours = lm_eval.api.metrics.bootstrap_stderr(perplexity, values, 1000)
    assert ours == pytest.approx(theirs, rel=1e-9)


def test_a_task_without_examples_needs_no_split_for_them(tokenizer, hub, tmp_path):
    shutil.copytree(hub / "allenai" / "sciq", tmp_path / "allenai" / "sciq")
    for file in (tmp_path / "allenai" / "sciq").glob("*-train.jsonl"):
        file.unlink()
    card = tmp_path / "allenai" / "sciq" / "README.md"
    card.write_text(re.sub(r"  - split: train\n    path: .*\n", "", card.read_text()))
    chosen = plan(suite=None, tasks=["sciq"], data_dir=str(tmp_path))
    scored = subject(model_of("pgdn_tiny"), tokenizer)
    assert {row.task for row in run(chosen, scored, limit=1).rows} == {"sciq"}
    shown = run(chosen, scored, limit=1, shots=2)
    assert not shown.rows and "sciq" in shown.missing["sciq"]


def test_every_set_of_conditions_has_a_file_of_its_own():
    from scripts.evaluate import Options, file_name

    changes = [
        {},
        {"limit": 200},
        {"limit": 100},
        {"num_fewshot": 5},
        {"lengths": "512,1024"},
        {"lengths": "2048"},
        {"max_length": 512},
        {"data_dir": "/data"},
        {"path": "recurrent"},
        {"tasks": "piqa,/a/mine.yaml"},
        {"tasks": "piqa,/b/mine.yaml"},
        {"tasks": ",".join(f"task_{i}" for i in range(100))},
    ]
    names = [
        file_name(7, Options(**({"run": "r", "tasks": "piqa"} | change))) for change in changes
    ]
    assert len(set(names)) == len(names) and max(map(len, names)) < 150
    assert names[:2] == ["step-00000007-piqa.json", "step-00000007-piqa-limit=200.json"]


def test_a_long_question_loses_its_beginning(tokenizer, monkeypatch):
    from lm_eval.api.instance import Instance

    from pdn.evals.harness import Harness

    seen = []
    monkeypatch.setattr(
        Scorer,
        "continuations",
        lambda self, prompts, **options: seen.extend(prompts) or [[] for _ in prompts],
    )
    harness = Harness(subject(model_of("pgdn_tiny"), tokenizer).scorer, open_codec(tokenizer, 0), 0)
    text = " ".join(map(str, range(300)))
    harness.generate_until(
        [Instance("generate_until", {}, (text, {"until": ["\n"], "max_gen_toks": 56}), 0)]
    )
    assert seen == [harness.tok_encode(text)[-200:]]


def test_every_rank_of_a_launch_gets_all_results_and_keeps_its_random_state(tokenizer, tmp_path):
    model = model_of("pgdn_tiny")
    chosen = plan(suite=None, tasks=["lambada_openai", "squad_answers"], data_dir=str(FIXTURES))
    expected = [list(row) for row in run(chosen, subject(model, tokenizer), limit=6).rows]

    def work(rank: int) -> list:
        os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": "2"}
        before = torch.get_rng_state()
        rows = run(
            chosen, subject(model, tokenizer, world=World(rank, 2, torch.device("cpu"))), limit=6
        ).rows
        assert torch.equal(torch.get_rng_state(), before)
        return rows

    assert run_ranks(2, work, tmp_path) == [expected, expected]
