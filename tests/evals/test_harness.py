"""Our lm-eval wrapper against lm-eval's own on the exported model; suites, task files, and errors.

Documents: tests/fixtures/eval; one slow test takes 200 of each from $PDN_TEST_EVAL_DATA, a folder
of the same files with more in them.
"""

import gzip
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pdn.data.codec import open_codec
from pdn.distributed.fsdp import World
from pdn.errors import ConfigError, DataError, StorageError
from pdn.evals.evaluation import run
from pdn.evals.probes.base import Subject
from pdn.evals.results import Row, record
from pdn.evals.scoring import Scorer
from pdn.evals.suites import CONFIGS, load_suite, plan, stock_tasks, suites
from pdn.hub import export
from pdn.inference.load import LoadedRun
from pdn.models.language_model import LanguageModel
from tests.evals.hub_data import write_hub_data
from tests.presets import TINY, model_config, small_overrides
from tests.ranks import run_ranks

FIXTURES = Path(__file__).parent.parent / "fixtures" / "eval"
WHOLE = os.environ.get("PDN_TEST_EVAL_DATA")
TASKS = ["lambada_openai", "piqa", "arc_easy", "wikitext", "squad_answers"]
VOCABULARY = 600
LENGTH = 256
PER_DOCUMENT = 1e-4  # log-likelihoods and metrics, relative above 1: float32 sums in another order


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """Allow local files only, and no cache outside of the test's directory."""
    changed = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TQDM_DISABLE": "1"}
    before = {key: os.environ.get(key) for key in changed}
    os.environ |= changed
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    datasets.config.HF_DATASETS_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    yield
    for key, value in before.items():
        os.environ.pop(key) if value is None else os.environ.update({key: value})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    pages = gzip.decompress(
        (FIXTURES / "wikitext2_raw_test_pages.jsonl.gz").read_bytes()
    ).splitlines()
    text = [json.loads(line)["page"] for line in pages]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<eos>"],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    trained.save(str(file))
    return file


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    write_hub_data(folder)
    return folder


def model_of(name: str, vocabulary: int = VOCABULARY) -> LanguageModel:
    # what the released class has
    shape = ("model.intermediate_size=0", "model.num_heads=8") if name == "mamba2_tiny" else ()
    model = LanguageModel(
        model_config(name, *small_overrides(name)[1:], *shape, f"model.vocab_size={vocabulary}")
    )
    model.init_weights(seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
            )
    return model.eval()


def subject(model: LanguageModel, tokenizer: Path, **changes) -> Subject:
    scorer = Scorer(
        **dict(
            model=model,
            world=World(0, 1, torch.device("cpu")),
            max_length=LENGTH,
            batch_size=8,
            bf16=False,
        )
        | changes
    )
    return Subject(
        scorer=scorer, config=model.config, tokenizer=tokenizer, eos_id=0, seq_len=LENGTH
    )


def ours(
    model: LanguageModel, tokenizer: Path, data: Path, limit: int | None, tasks=TASKS, **changes
) -> dict[str, float]:
    chosen = plan(suite=None, tasks=tasks, data_dir=str(data))
    return values(run(chosen, subject(model, tokenizer, **changes), limit=limit).rows)


def values(rows: list[Row]) -> dict[str, float]:
    return {f"{row.task}/{row.metric}": row.value for row in rows}


def their_model(folder: Path):
    """Load a model by its class in transformers.

    flash-linear-attention, once imported, claims the name of Mamba-2 for its own.
    """
    import transformers

    architecture = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    return getattr(transformers, architecture).from_pretrained(folder, dtype=torch.float32).eval()


def theirs(
    folder: Path, data: Path, limit: int | None, length: int, tasks=TASKS
) -> dict[str, float]:
    """Run the same tasks through lm-eval's own class on the exported folder."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from pdn.evals.harness import _rows
    from pdn.evals.tasks import load_tasks

    chosen = plan(suite=None, tasks=tasks, data_dir=str(data))
    lm = HFLM(
        pretrained=their_model(folder),
        tokenizer=str(folder),
        device="cpu",
        batch_size=8,
        max_length=length,
    )
    loaded = list(load_tasks(chosen, {}).tasks.values())
    found = simple_evaluate(
        lm,
        tasks=loaded,
        task_manager=TaskManager(include_defaults=False),  # or it reads all 13,000 files of tasks
        limit=limit,
        bootstrap_iters=0,
        log_samples=False,
    )
    return values(
        [row for name, results in found["results"].items() for row in _rows(name, results)]
    )


def assert_close(a: dict[str, float], b: dict[str, float]) -> None:
    assert a.keys() == b.keys() and len(a) >= 10
    for key in a:
        assert a[key] == pytest.approx(b[key], rel=PER_DOCUMENT, abs=PER_DOCUMENT), key


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transformer_tiny", "mamba2_tiny"])
def test_our_scores_are_those_of_lm_eval_on_the_exported_model(name, tokenizer, tmp_path):
    model = model_of(name)
    loaded = LoadedRun(tmp_path, model, tokenizer, eos_id=0, step=1, seq_len=LENGTH)
    export(loaded, tmp_path / "exported")
    assert_close(
        ours(model, tokenizer, FIXTURES, None),
        theirs(tmp_path / "exported", FIXTURES, None, LENGTH),
    )


def test_every_task_of_the_paper_runs_from_copies_of_the_hubs_data_and_scores_as_in_lm_eval(
    tokenizer, hub, tmp_path
):
    model = model_of("transformer_tiny")
    export(
        LoadedRun(tmp_path, model, tokenizer, eos_id=0, step=1, seq_len=512), tmp_path / "exported"
    )
    tasks = [task for task in load_suite("paper").tasks if not task.startswith("niah")]
    assert not plan(suite=None, tasks=tasks, data_dir=str(hub)).local
    found = ours(model, tokenizer, hub, None, tasks, max_length=512)
    assert {key.partition("/")[0] for key in found} == set(tasks)
    assert_close(found, theirs(tmp_path / "exported", hub, None, 512, tasks))


@pytest.mark.slow
def test_rulers_needles_are_seen_whole_whatever_max_length_is(tokenizer, hub, monkeypatch):
    import nltk

    monkeypatch.setattr(nltk, "download", lambda name: False)
    from lm_eval.tasks.ruler import prepare_niah

    # nltk's needs a download
    monkeypatch.setattr(prepare_niah, "sent_tokenize", lambda text: text.split(". "))
    seen = []
    monkeypatch.setattr(
        Scorer,
        "continuations",
        lambda self, prompts, **options: seen.extend(map(len, prompts)) or [[] for _ in prompts],
    )
    chosen = replace(subject(model_of("pgdn_tiny"), tokenizer), lengths=(1024,))
    outcome = run(plan(suite="ruler", tasks=[], data_dir=str(hub)), chosen, limit=2)
    assert not outcome.missing and [row.metric for row in outcome.rows] == ["accuracy@1024"] * 3
    assert len(seen) == 6 and max(seen) > 3 * LENGTH


def test_single_requests_agree_with_lm_eval_on_the_exported_model(tokenizer, tmp_path):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from pdn.evals.harness import Harness

    model = model_of("transformer_tiny")
    export(
        LoadedRun(tmp_path, model, tokenizer, eos_id=0, step=1, seq_len=LENGTH),
        tmp_path / "exported",
    )
    reference = HFLM(
        pretrained=str(tmp_path / "exported"),
        device="cpu",
        dtype="float32",
        batch_size=4,
        max_length=LENGTH,
    )
    mine = Harness(subject(model, tokenizer).scorer, open_codec(tokenizer, 0), 0)
    texts = [
        ("", "word"),
        ("a b ", "c"),
        ("The quick", " brown fox"),
        (" ".join(map(str, range(300))), " end"),
        ("one\n\ntwo", "\nthree"),
        ("é", "ü 😀"),
    ]
    pairs = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(texts)]
    for (a, greedy_a), (b, greedy_b) in zip(
        mine.loglikelihood(pairs), reference.loglikelihood(pairs), strict=True
    ):
        assert a == pytest.approx(b, abs=PER_DOCUMENT) and greedy_a == greedy_b
    whole = [
        Instance("loglikelihood_rolling", {}, (text * 30,), i)
        for i, (text, _) in enumerate(texts[1:])
    ]
    for a, b in zip(
        mine.loglikelihood_rolling(whole), reference.loglikelihood_rolling(whole), strict=True
    ):
        assert a == pytest.approx(b, rel=1e-6)
    options = {"until": ["a", "\n"], "max_gen_toks": 20}
    asked = [
        Instance("generate_until", {}, (text or "q", options), i)
        for i, (text, _) in enumerate(texts)
    ]
    assert mine.generate_until(asked) == reference.generate_until(asked)


def test_repeats_of_a_document_differ_and_do_not_depend_on_the_batch_size(tokenizer):
    from lm_eval.api.instance import Instance

    from pdn.evals.harness import Harness

    model, codec = model_of("pgdn_tiny"), open_codec(tokenizer, 0)
    options = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
    documents = [
        Instance("generate_until", {}, ("one prompt", options), 0, ("task", i, 4)) for i in (0, 1)
    ]
    asked = [document for document in documents for _ in range(4)]
    by_size = [
        Harness(subject(model, tokenizer, batch_size=size).scorer, codec, 0).generate_until(asked)
        for size in (1, 3, 8)
    ]
    assert len(set(by_size[0])) == 8
    assert by_size[0] == by_size[1] == by_size[2]


@pytest.mark.slow
@pytest.mark.skipif(not WHOLE, reason="needs PDN_TEST_EVAL_DATA")
@pytest.mark.parametrize("name", ["transformer_tiny", "mamba2_tiny"])
def test_two_hundred_documents_each_agree_with_lm_eval_on_the_exported_model(
    name, tokenizer, tmp_path
):
    model = model_of(name)
    export(
        LoadedRun(tmp_path, model, tokenizer, eos_id=0, step=1, seq_len=512), tmp_path / "exported"
    )
    found = ours(model, tokenizer, Path(WHOLE), 200, max_length=512)
    assert_close(found, theirs(tmp_path / "exported", Path(WHOLE), 200, 512))


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_every_model_scores_the_same_by_both_paths(name, tokenizer):
    model = model_of(name).double()
    chunkwise, recurrent = (
        ours(model, tokenizer, FIXTURES, 8, path=path) for path in ("chunkwise", "recurrent")
    )
    assert_close(chunkwise, recurrent)


# ---------------------------------------------------------------- suites, names, errors


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


def test_an_unreachable_hub_is_asked_once(monkeypatch):
    import datasets
    import huggingface_hub

    from pdn.evals.tasks import load_tasks

    asked = []

    def load_dataset(path, *args, **kwargs):
        asked.append((path, huggingface_hub.constants.HF_HUB_OFFLINE))
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    chosen = plan(suite=None, tasks=["sciq", "fda"], data_dir=None)
    assert load_tasks(chosen, {}).missing.keys() == {"sciq", "fda"}
    assert asked == [("allenai/sciq", False), ("hazyresearch/based-fda", True)]
    assert (
        huggingface_hub.constants.HF_HUB_OFFLINE is False and datasets.load_dataset is load_dataset
    )


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


def choices(folder: Path, documents: list[dict], **keys) -> str:
    """Write a task of multiple choice over ``documents``; return its path."""
    (folder / "docs.jsonl").write_text("\n".join(map(json.dumps, documents)))
    task = {
        "task": "choices",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "docs.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    } | keys
    (folder / "choices.yaml").write_text(json.dumps(task))
    return str(folder / "choices.yaml")


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
    task = choices(tmp_path, [GOOD, GOOD, GOOD, GOOD | bad, GOOD])
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
