"""Log-likelihoods and continuations of token sequences: what evaluations ask of a model, shared out
over the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from pdn.distributed.collectives import together
from pdn.distributed.world import World
from pdn.inference.generate import generate
from pdn.models.language_model import LanguageModel

T = TypeVar("T")
LOGIT_ELEMENTS = 2**26  # of one slice: 256 MiB in float32


@dataclass(frozen=True)
class Scorer:
    """A whole model on this rank's device; every rank has one and calls the same methods with the
    same arguments.

    max_length: tokens that a forward pass sees, the training's length if nothing else is said.
        Longer sequences lose their beginning, as in lm-eval.
    batch_size: sequences of a forward pass, of similar lengths.
    path: chunkwise runs whole sequences; recurrent feeds them token by token through the state, as
        decoding does.
    alive: called before each batch, by the probes too.
    check: likewise, where an error with an ``exit_code`` that it raises on one rank ends the
        evaluation on all.
    """

    model: LanguageModel
    world: World
    max_length: int
    batch_size: int
    bf16: bool
    path: Literal["chunkwise", "recurrent"] = "chunkwise"
    alive: Callable[[], None] = lambda: None
    check: Callable[[], None] = lambda: None

    @property
    def device(self) -> torch.device:
        return self.world.device

    def whole(self) -> Scorer:
        """The same without a longest length: for tests of what happens beyond it."""
        return replace(self, max_length=2**31)

    def loglikelihoods(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[tuple[float, bool]]:
        """For each (context, continuation): log p(continuation | context) in nats, and whether
        greedy decoding yields it.

        Raises:
            ValueError: an empty context or continuation, or a continuation longer than
                ``max_length``.
        """
        for context, continuation in pairs:
            if not context or not 0 < len(continuation) <= self.max_length:
                raise ValueError(
                    f"{len(context)} tokens of context, {len(continuation)} of continuation: "
                    "expected at least one of each, "
                    f"and no more than max_length = {self.max_length} of the latter"
                )
        return self._shared_out(pairs, lambda pair: len(pair[0]) + len(pair[1]), self._score)

    def continuations(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        eos_id: int | None,
        done: Callable[[list[int]], bool] = lambda tokens: False,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seeds: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """The tokens that follow each prompt, without EOS.

        Args:
            done: whether a sequence may stop after these tokens; it is cut there.
            seeds: of each prompt's samples, which depend on nothing else of the batch; needed
                unless the temperature is 0.
        """

        def decode(items: list[tuple[Sequence[int], int]]) -> list[list[int]]:
            batch = [prompt for prompt, _ in items]
            options = dict(
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                eos_id=eos_id,
                seeds=[seed for _, seed in items],
            )
            found: list[list[int]] = [[] for _ in batch]
            running = set(range(len(batch)))
            with self._precision():
                for tokens in generate(self.model, batch, max_new_tokens=max_new_tokens, **options):
                    step = tokens.tolist()
                    for row in sorted(running):
                        if step[row] == eos_id:
                            running.discard(row)
                            continue
                        found[row].append(step[row])
                        if done(found[row]):
                            running.discard(row)
                    if not running:
                        break
            return found

        if seeds is None:
            if temperature > 0:
                raise ValueError(f"{temperature=} without seeds: expected one for each prompt")
            seeds = [0] * len(prompts)
        items = list(zip(prompts, seeds, strict=True))
        return self._shared_out(items, lambda item: len(item[0]), decode)

    def _shared_out(
        self, items: Sequence, size: Callable, work: Callable[[list], list[T]]
    ) -> list[T]:
        """``work`` on batches of items of similar size, longest first; every rank does its share,
        and gets all results.
        """
        order = sorted(range(len(items)), key=lambda i: -size(items[i]))
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]

        def mine() -> list[list[T]]:
            share = batches[self.world.world_rank :: self.world.size]
            hidden = None if self.world.is_main else True  # None: shown in a terminal only
            results = []
            for batch in tqdm(share, disable=hidden, leave=False):
                self.alive()
                self.check()
                results.append(work([items[i] for i in batch]))
            return results

        results = together(mine)
        found: list = [None] * len(items)
        for number, batch in enumerate(batches):
            for i, result in zip(
                batch, results[number % self.world.size][number // self.world.size], strict=True
            ):
                found[i] = result
        return found

    @torch.inference_mode()
    def _score(self, batch: list[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
        rows = [
            ([*context, *continuation][-(self.max_length + 1) :], len(continuation))
            for context, continuation in batch
        ]
        width = max(len(tokens) for tokens, _ in rows)
        inputs = torch.zeros(len(rows), width - 1, dtype=torch.int64)
        labels = torch.full((len(rows), width - 1), -1, dtype=torch.int64)
        for i, (tokens, counted) in enumerate(
            rows
        ):  # padded on the right, where nothing that is read can see it
            inputs[i, : len(tokens) - 1] = torch.tensor(tokens[:-1])
            labels[i, len(tokens) - 1 - counted : len(tokens) - 1] = torch.tensor(tokens[-counted:])
        inputs, labels = inputs.to(self.device), labels.to(self.device)
        with self._precision():
            hidden = self._hidden(inputs)
            wanted = labels >= 0
            log_probs, greedy = self._read_out(hidden[wanted], labels[wanted])
        owner = wanted.nonzero()[:, 0]
        sums = torch.zeros(len(rows), dtype=torch.float64, device=self.device).index_add_(
            0, owner, log_probs.double()
        )
        misses = torch.zeros(len(rows), dtype=torch.int64, device=self.device).index_add_(
            0, owner, (~greedy).long()
        )
        return list(zip(sums.tolist(), (misses == 0).tolist(), strict=True))

    def _hidden(self, inputs: Tensor) -> Tensor:
        if self.path == "chunkwise":
            return self.model.hidden(inputs)[0]
        state, parts = self.model.init_state(len(inputs)), []
        for token in inputs.split(1, 1):
            hidden, state = self.model.hidden(token, state=state)
            parts.append(hidden)
        return torch.cat(parts, 1)

    def _read_out(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the labels [N] and whether they are the likeliest, from hidden [N,
        D], in slices of rows.
        """
        weight = self.model.head_weight
        rows = max(1, LOGIT_ELEMENTS // weight.shape[0])
        log_probs, greedy = [], []
        for h, label in zip(hidden.split(rows), labels.split(rows), strict=True):
            logits = F.linear(h, weight)
            wide = torch.promote_types(logits.dtype, torch.float32)
            log_probs.append(logits.to(wide).log_softmax(-1).gather(1, label[:, None])[:, 0])
            greedy.append(logits.argmax(-1) == label)
        return torch.cat(log_probs), torch.cat(greedy)

    def _precision(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)
