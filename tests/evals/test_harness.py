"""Our lm-eval wrapper against lm-eval's own on the exported model.

Documents: tests/fixtures/eval; one slow test takes 200 of each from $PDN_TEST_EVAL_DATA, a folder
of the same files with more in them.
"""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pdn.data.codec import Codec, open_codec
from pdn.evals.evaluation import run
from pdn.evals.results import Row
from pdn.evals.scoring import Scorer
from pdn.evals.suites import load_suite, plan
from pdn.hub import export
from pdn.inference.load import LoadedRun
from pdn.models.language_model import LanguageModel
from tests.evals.subjects import FIXTURES, LENGTH, model_of, subject
from tests.presets import TINY

WHOLE = os.environ.get("PDN_TEST_EVAL_DATA")
pytestmark = pytest.mark.usefixtures("offline")
TASKS = ["lambada_openai", "piqa", "arc_easy", "wikitext", "squad_answers"]
PER_DOCUMENT = 1e-4  # log-likelihoods and metrics, relative above 1: float32 sums in another order


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


def test_every_text_is_encoded_once_and_together(tokenizer, monkeypatch):
    from lm_eval.api.instance import Instance

    from pdn.evals.harness import Harness

    given = subject(model_of("pgdn_tiny"), tokenizer)
    harness = Harness(given.scorer, open_codec(tokenizer, 0), 0)
    arguments = [("One two ", "three"), ("One two ", "four"), ("One two", " three"), ("", "five")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(arguments)]
    monkeypatch.setattr(Scorer, "loglikelihoods", lambda self, pairs: pairs)
    found = harness.loglikelihood(requests)
    calls = []
    encode = Codec.encode
    monkeypatch.setattr(
        Codec, "encode", lambda self, texts: calls.append(texts) or encode(self, texts)
    )
    assert harness.loglikelihood(requests) == found
    assert calls == [["One two", "One two three", "One two four", "", "five"]]
    monkeypatch.setattr(Harness, "_encode_ahead", lambda self, texts: None)
    assert harness.loglikelihood(requests) == found and len(calls) > 5


@pytest.mark.parametrize("stops", [("\n",), ("\n\n", "Question:"), ("é…",), ()])
def test_a_stop_is_seen_in_the_last_tokens_when_it_is_in_the_whole_text(tokenizer, stops):
    from pdn.evals.harness import _Stops

    codec = open_codec(tokenizer, 0)
    ends = _Stops(codec, stops)
    draw = torch.Generator().manual_seed(0)
    pieces = ["\n", "\n\n", "Quest", "ion:", " é", "…", "é…", " a word", "🎉", "Question", ": "]
    for _ in range(12):
        text = "".join(pieces[int(i)] for i in torch.randint(len(pieces), (60,), generator=draw))
        tokens = codec.ids(text)
        whole = [any(s in codec.decode(tokens[:n]) for s in stops) for n in range(len(tokens) + 1)]
        seen = [ends(tokens[:n]) for n in range(len(tokens) + 1)]
        first = whole.index(True) if True in whole else len(whole)
        assert seen[: first + 1] == whole[: first + 1]


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
