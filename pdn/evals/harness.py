"""The lm-evaluation-harness on our models, without conversion.

Importing this module imports lm_eval, which takes seconds.
"""

from __future__ import annotations

import contextlib
import random
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import lm_eval.api.metrics
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.evaluator import evaluate
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from pdn.data.codec import Codec
from pdn.errors import ConfigError, DataError, PdnError
from pdn.evals.generation import Generation, read_generation
from pdn.evals.results import Row
from pdn.evals.scoring import Scorer
from pdn.inference.sampling import stream_seed

FEWSHOT_SEED = 1234  # lm-eval's own
SAMPLING_SEED = 0
# for the standard errors that have no formula; lm-eval's 100,000 take minutes
BOOTSTRAP_ITERS = 1000
TEXTS = 4096  # that are encoded together
MARGIN, BYTES = 8, 4  # tokens beside a stop; most tokens of one of its characters


class Harness(TemplateLM):
    """Answers lm-eval's requests with a Scorer, as lm_eval.api.model.LM asks for.

    lm-eval sees one process: the scorer shares its requests out over the ranks.

    Args:
        scorer: the model.
        tokenizer: that it was trained with; text that looks like a special token stays text.
        eos_id: what precedes a document, and what an empty context is replaced by.
        usual_length: tokens that the model was trained to see; another ``max_length`` is a
            condition of the results.
    """

    def __init__(
        self, scorer: Scorer, tokenizer: Codec, eos_id: int, usual_length: int | None = None
    ):
        super().__init__()
        self.scorer, self.codec, self.eos_id = scorer, tokenizer, eos_id
        self._encoded: dict[str, list[int]] = {}  # texts of the requests at hand
        self.usual_length = usual_length or scorer.max_length

    @property
    def eot_token_id(self) -> int:
        return self.eos_id

    @property
    def max_length(self) -> int:
        return self.scorer.max_length

    # lm-eval gives its own property the type of what it begins with, None
    @property
    def device(self):  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.scorer.device

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs
    ) -> list[int]:
        found = self._encoded.get(string)
        return self.codec.ids(string) if found is None else found

    def _encode_ahead(self, texts: Iterable[str]) -> None:
        """Encode each text once, many together, which the tokenizer does by several threads."""
        distinct = list(dict.fromkeys(texts))
        for start in range(0, len(distinct), TEXTS):
            some = distinct[start : start + TEXTS]
            rows = self.codec.encode(some)
            self._encoded |= {text: row.tolist() for text, row in zip(some, rows, strict=True)}

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Return the log-probability in nats of each answer, and whether it is the likeliest.

        Raises:
            DataError: an answer without tokens; names task and document.
            ConfigError: an answer longer than ``max_length``; likewise.
        """
        self._asked = requests
        for request in requests:
            if not request.arguments[1]:
                raise _no_answer(request)
        # what lm-eval asks to be encoded of each; it would ask for the context with every choice
        asked = [request.arguments for request in requests]
        self._encode_ahead(
            text for context, answer in asked for text in (context.rstrip(), context + answer)
        )
        try:
            return super().loglikelihood(requests, disable_tqdm)
        finally:
            self._encoded = {}

    def _loglikelihood_tokens(self, requests, **kwargs) -> list[tuple[float, bool]]:
        for asked, (*_, answer) in zip(self._asked, requests, strict=True):
            if not answer:
                raise _no_answer(asked)
            if len(answer) > self.max_length:
                raise ConfigError(
                    "EVAL-LENGTH",
                    f"{_where(asked)}: an answer has {len(answer)} tokens, and max_length = "
                    f"{self.max_length}; expected room for it: max_length={2 * len(answer)}",
                )
        return self.scorer.loglikelihoods(
            [(context, continuation) for _, context, continuation in requests]
        )

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Score every token once, in windows of ``max_length``.

        A window sees nothing of the one before but its last token.
        """
        pairs, owners = [], []
        for i, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.eos_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in map(make_disjoint_window, windows):
                pairs.append(window)
                owners.append(i)
        totals = [0.0] * len(requests)
        for owner, (log_prob, _) in zip(owners, self.scorer.loglikelihoods(pairs), strict=True):
            totals[owner] += log_prob
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        found: list[str] = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.arguments[1]), []).append(i)
        seeds = _seeds(requests)
        for members in groups.values():
            first = requests[members[0]]
            texts = self._continue(
                [requests[i].args[0] for i in members],
                read_generation(first.task_name or "task", first.arguments[1], first.repeats or 1),
                [seeds[i] for i in members],
            )
            for i, text in zip(members, texts, strict=True):
                found[i] = text
        return found

    def _continue(
        self, contexts: Sequence[str], options: Generation, seeds: Sequence[int]
    ) -> list[str]:
        room = _room(self.max_length, options.max_new_tokens)
        encoded = self.codec.encode(list(contexts))
        prompts = [(row.tolist() or [self.eos_id])[-room:] for row in encoded]
        tokens = self.scorer.continuations(
            prompts,
            max_new_tokens=options.max_new_tokens,
            eos_id=self.eos_id,
            seeds=seeds,
            done=_Stops(self.codec, options.stops),
            how=options.how,
        )
        return [_before_stop(self.codec.decode(row), options.stops) for row in tokens]


class _Stops:
    """Says whether one of some texts stands at the end of what was generated.

    Only the last tokens are decoded, which a stop that has just become whole lies in, with a margin
    for the first of them, whose text may depend on the one before.
    """

    def __init__(self, codec: Codec, stops: Sequence[str]):
        self.codec, self.stops = codec, stops
        self.most = MARGIN + BYTES * max(map(len, stops), default=0)

    def __call__(self, tokens: list[int]) -> bool:
        if not self.stops:
            return False
        text = self.codec.decode(tokens[-self.most :])
        return any(stop in text for stop in self.stops)


def _where(request: Instance) -> str:
    return f"{request.task_name}: document {request.doc_id}"


def _no_answer(request: Instance) -> DataError:
    return DataError(
        "EVAL-ANSWER",
        f"{_where(request)}: the answer {request.arguments[1]!r} has no tokens; expected at least "
        "one in every choice: correct the document, or the task's doc_to_choice and doc_to_target",
    )


def _seeds(requests: list[Instance]) -> list[int]:
    """Return the seed of each request's samples, from its task, document and repeat.

    lm-eval asks for repeats by the same request again.
    """
    repeats: Counter[tuple] = Counter()
    seeds = []
    for request in requests:
        key = (request.task_name, request.doc_id, request.idx)
        seeds.append(stream_seed(SAMPLING_SEED, *key, repeats[key]))
        repeats[key] += 1
    return seeds


def _room(max_length: int, new_tokens: int) -> int:
    """Return the tokens that are left for a question. Raises ConfigError: none."""
    if max_length <= new_tokens:
        raise ConfigError(
            "EVAL-LENGTH",
            f"max_length = {max_length}: the task generates {new_tokens} tokens, which leaves none "
            f"for its question; expected more than {new_tokens}: max_length={2 * new_tokens}",
        )
    return max_length - new_tokens


def check_room(tasks: dict[str, Task], max_length: int) -> None:
    """Raise ConfigError if a task's answers cannot be generated, or leave its questions no room.

    Called before hours of training, or of scoring.
    """
    for task in tasks.values():
        if task.OUTPUT_TYPE == "generate_until":
            options, repeats = (task.get_config(key) for key in ("generation_kwargs", "repeats"))
            asked = read_generation(str(task.config.task), options or {}, repeats or 1)
            _room(max_length, asked.max_new_tokens)


def _before_stop(text: str, stops: Sequence[str]) -> str:
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


class TaskResult(NamedTuple):
    """Holds what one task gave: see ``evaluation.Outcome``."""

    rows: list[Row]
    about: dict[str, Any]
    samples: list[dict[str, Any]]


def run_task(
    harness: Harness,
    name: str,
    task: Task,
    *,
    limit: int | None,
    shots: int | None,
    samples: int | None,
) -> TaskResult:
    """Evaluate one task; every rank returns the same.

    Args:
        limit: documents, the first ones; None takes all.
        shots, samples: see ``evaluation.run``.

    Raises:
        DataError: the task's templates or metrics fail on a document, which is named.
    """
    usual = task.get_config("num_fewshot") or 0
    shots = usual if shots is None else shots
    task.set_config(key="num_fewshot", value=shots)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    _name_documents(task)
    # Not simple_evaluate, which seeds every global generator and returns nothing on other ranks.
    with _plain_bootstrap():
        result = evaluate(
            harness,
            task_dict={"tasks": {name: task}},
            limit=limit,
            bootstrap_iters=BOOTSTRAP_ITERS,
            log_samples=samples != 0,
        )
    assert result is not None  # each rank evaluates alone
    found: dict[str, Any] = {**result}
    count = found["n-samples"][name]
    cut = limit is not None and limit < count["original"]
    parts = [f"limit={limit}"] if cut else []
    parts += [f"shots={shots}"] if shots != usual else []
    # RULER's tasks are seen whole.
    room = min(harness.max_length, 2**30)
    parts += [f"max_length={room}"] if room not in (harness.usual_length, 2**30) else []
    about = {
        "n": count["effective"],
        "documents": count["original"],
        "limit": limit if cut else None,
        "shots": shots,
        "max_length": None if room == 2**30 else room,
        "task_version": found["versions"].get(name),
        "lm_eval": version("lm_eval"),
        "dataset": [task.DATASET_PATH, task.DATASET_NAME],
        "bootstrap_iters": BOOTSTRAP_ITERS,
    }
    rows = list(_rows(name, found["results"][name], count["effective"], ",".join(parts)))
    kept = found["samples"][name] if samples != 0 else []
    return TaskResult(rows, about, [_sample(name, kept_one) for kept_one in kept[:samples]])


def _sample(task: str, found: dict[str, Any]) -> dict[str, Any]:
    """Return what was asked and answered, from lm-eval's record of one document."""
    metrics = {key: found[key] for key in found["metrics"]}
    keys = ("doc_id", "filter", "arguments", "target", "resps", "filtered_resps")
    return {"task": task} | {key: found[key] for key in keys} | {"metrics": metrics}


def _name_documents(task: Task) -> None:
    """Make the task's own code fail with the number of the document that it fails on."""
    for method in ("fewshot_context", "construct_requests", "process_results"):
        work = getattr(task, method)

        def named(*args, work=work, **kwargs):
            try:
                if work.__name__ == "process_results":
                    _require_target(task, kwargs.get("doc", args[0] if args else None))
                return work(*args, **kwargs)
            except PdnError:
                raise
            except Exception as error:
                document = kwargs.get("doc", args[0] if args else None)
                number = next((i for i, doc in enumerate(task.eval_docs) if doc == document), "?")
                reason = (str(error).strip().splitlines() or [""])[0][:300]
                raise DataError(
                    "EVAL-DOCUMENT",
                    f"{task.config.task}: document {number}: {type(error).__name__}: {reason}; "
                    "expected a document that the task's templates and metrics can take: correct "
                    "it, or them",
                ) from error

        setattr(task, method, named)


def _require_target(task: Task, document: Any) -> None:
    """Raise ValueError if the right answer is none of the choices.

    lm-eval would count the document as answered wrongly.
    """
    if not isinstance(task, ConfigurableTask) or callable(task.config.process_results):
        return  # it counts by itself
    if task.OUTPUT_TYPE != "multiple_choice" or task.multiple_input:
        return
    choices, target = task.doc_to_choice(document), task.doc_to_target(document)
    known = range(len(choices)) if isinstance(target, int) else choices
    if isinstance(target, int | str) and target not in known:
        raise ValueError(f"the right answer, {target!r}, is none of the {len(choices)} choices")


@contextlib.contextmanager
def _plain_bootstrap() -> Iterator[None]:
    """Make lm-eval draw its bootstrap here, while the context is open.

    Its own forks a process for each core, and prints.
    """
    drawn = lm_eval.api.metrics.bootstrap_stderr

    def bootstrap_stderr(statistic, values, iters: int) -> float:
        rng = random.Random(0)
        draws = [statistic(rng.choices(values, k=len(values))) for _ in range(iters)]
        return statistics.stdev(draws)

    lm_eval.api.metrics.bootstrap_stderr = bootstrap_stderr
    try:
        yield
    finally:
        lm_eval.api.metrics.bootstrap_stderr = drawn


def _rows(
    task: str, found: dict[str, Any], n: int | None = None, condition: str = ""
) -> Iterator[Row]:
    """Convert lm-eval's ``metric,filter`` to rows.

    RULER names its metrics by length, and those that did not run are -1.
    """
    for key, value in found.items():
        metric, _, filter_name = key.partition(",")
        if not filter_name or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = found.get(f"{metric}_stderr,{filter_name}")
        stderr = float(stderr) if isinstance(stderr, int | float) else None
        if metric.isdigit():
            if value < 0:
                continue
            metric = f"accuracy@{metric}"
        elif filter_name != "none":
            metric = f"{metric}_{filter_name}"
        yield Row(task, metric, float(value), stderr, n, condition)
