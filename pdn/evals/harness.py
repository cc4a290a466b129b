"""The lm-evaluation-harness on our models, without conversion. Importing this module imports
lm_eval, which takes seconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from lm_eval import evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import Task
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from pdn.data.codec import Codec
from pdn.errors import ConfigError
from pdn.evals.results import Row
from pdn.evals.scoring import Scorer
from pdn.inference.generate import stream_seed

FEWSHOT_SEED = 1234  # lm-eval's own
SAMPLING_SEED = 0
MAX_NEW_TOKENS = 256  # where a task does not say
SAMPLING = ("temperature", "top_k", "top_p")


class Harness(TemplateLM):
    """lm_eval.api.model.LM over a Scorer. lm-eval sees one process: the scorer shares its requests
    out over the ranks.

    Args:
        scorer: the model.
        tokenizer: that it was trained with; text that looks like a special token stays text.
        eos_id: what precedes a document, and what an empty context is replaced by.
    """

    def __init__(self, scorer: Scorer, tokenizer: Codec, eos_id: int):
        super().__init__()
        self.scorer, self.codec, self.eos_id = scorer, tokenizer, eos_id

    @property
    def eot_token_id(self) -> int:
        return self.eos_id

    @property
    def max_length(self) -> int:
        return self.scorer.max_length

    @property
    def device(self):
        return self.scorer.device

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs
    ) -> list[int]:
        return self.codec.ids(string)

    def _loglikelihood_tokens(self, requests, **kwargs) -> list[tuple[float, bool]]:
        longest = max((len(continuation) for *_, continuation in requests), default=0)
        if longest > self.max_length:
            raise ConfigError(
                "EVAL-LENGTH",
                f"max_length = {self.max_length}: an answer has {longest} tokens; expected room "
                f"for it: max_length={2 * longest}",
            )
        return self.scorer.loglikelihoods(
            [(context, continuation) for _, context, continuation in requests]
        )

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Every token once, in windows of ``max_length`` that see nothing of the one before but its
        last token.
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
            groups.setdefault(repr(request.args[1]), []).append(i)
        seeds = _seeds(requests)
        for members in groups.values():
            texts = self._continue(
                [requests[i].args[0] for i in members],
                dict(requests[members[0]].args[1]),
                [seeds[i] for i in members],
            )
            for i, text in zip(members, texts, strict=True):
                found[i] = text
        return found

    def _continue(
        self, contexts: Sequence[str], options: dict[str, Any], seeds: Sequence[int]
    ) -> list[str]:
        until = options.get("until") or []
        stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        new_tokens = options.get("max_gen_toks", options.get("max_new_tokens", MAX_NEW_TOKENS))
        room = _room(self.max_length, new_tokens)
        prompts = [(self.tok_encode(context) or [self.eos_id])[-room:] for context in contexts]
        sampling = {key: options[key] for key in SAMPLING if options.get(key) is not None}
        if not options.get("do_sample", bool(sampling.get("temperature"))):
            sampling = {"temperature": 0.0}
        tokens = self.scorer.continuations(
            prompts,
            max_new_tokens=new_tokens,
            eos_id=self.eos_id,
            seeds=seeds,
            done=lambda tokens: any(stop in self.codec.decode(tokens) for stop in stops),
            **sampling,
        )
        return [_before_stop(self.codec.decode(row), stops) for row in tokens]


def _seeds(requests: list[Instance]) -> list[int]:
    """The seed of each request's samples, from its task, document and repeat; lm-eval asks for
    repeats by the same request again.
    """
    repeats: Counter[tuple] = Counter()
    seeds = []
    for request in requests:
        key = (request.task_name, request.doc_id, request.idx)
        seeds.append(stream_seed(SAMPLING_SEED, *key, repeats[key]))
        repeats[key] += 1
    return seeds


def _room(max_length: int, new_tokens: int) -> int:
    """Tokens that are left for a question. Raises ConfigError: none."""
    if max_length <= new_tokens:
        raise ConfigError(
            "EVAL-LENGTH",
            f"max_length = {max_length}: the task generates {new_tokens} tokens, which leaves none "
            "for its question; "
            f"expected more than {new_tokens}: max_length={2 * new_tokens}",
        )
    return max_length - new_tokens


def check_room(tasks: dict[str, Task], max_length: int) -> None:
    """Raise ConfigError if a task's answers leave no room for its questions: before hours of
    training, or of scoring.
    """
    for task in tasks.values():
        if task.OUTPUT_TYPE == "generate_until":
            _room(
                max_length,
                (task.get_config("generation_kwargs") or {}).get("max_gen_toks", MAX_NEW_TOKENS),
            )


def _before_stop(text: str, stops: list[str]) -> str:
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def run_tasks(harness: Harness, tasks: dict[str, Task], *, limit: int | None) -> list[Row]:
    """Evaluate; every rank returns the same rows.

    limit: documents of each task, the first ones; None takes all.
    """
    # Not simple_evaluate, which seeds every global generator and returns nothing on other ranks.
    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    results = evaluate(
        harness, task_dict={"tasks": tasks}, limit=limit, bootstrap_iters=0, log_samples=False
    )
    return [row for name, found in results["results"].items() for row in _rows(name, found)]


def _rows(task: str, found: dict[str, Any]) -> Iterator[Row]:
    """lm-eval's ``metric,filter`` to rows. RULER names its metrics by length, and those that did
    not run are -1.
    """
    for key, value in found.items():
        metric, _, filter_name = key.partition(",")
        if not filter_name or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        if metric.isdigit():
            if value < 0:
                continue
            metric = f"accuracy@{metric}"
        elif filter_name != "none":
            metric = f"{metric}_{filter_name}"
        yield Row(task, metric, float(value))
