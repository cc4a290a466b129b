"""Decoding at the speed of memory: one CUDA graph a token over fixed buffers.

A step reads one token of every sequence, advances all states in place and samples the next token on
the device. On a GPU it is captured once and replayed; on a CPU the same code runs as it is. The
host looks at the tokens every few steps only.

Sequences are rows that do not know each other: a row may begin a new sequence while the others go
on. Long prompts are read by the model's forward pass; what is left of them, and short ones, token
by token along with the other rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from pdn import verdicts
from pdn.inference.layers import DecodingModel
from pdn.inference.sampling import Sampling, sample, uniforms
from pdn.models.language_model import LanguageModel
from pdn.ops.types import autocast_dtype

BURST = 16  # steps of a graph between two looks at the tokens
READ_BY_STEPS = 32  # tokens that steps read of a prompt's end, so that ragged ones share passes
SHORTEST_CACHE = 256  # tokens of attention
GREEDY = Sampling(temperature=0)
REFILL = 4  # a prefill waits until one row in so many is free


class Decoder:
    """Decodes up to ``batch`` sequences at a time with one model.

    The model's weights are read when the decoder is made, and shared where they need no conversion.

    Args:
        model: whole, not sharded.
        batch: rows.
        how: tokens are chosen.
        max_new_tokens: of a sequence; only where they are drawn at random, beyond that they repeat
            their last draw.
        length: tokens of prompt and continuation that attention layers have room for at first; the
            room grows as needed.
        dtype: of weights and activations; by default autocast's if it is on, else the model's.
    """

    def __init__(
        self,
        model: LanguageModel,
        batch: int,
        *,
        how: Sampling = GREEDY,
        max_new_tokens: int = 1,
        length: int = SHORTEST_CACHE,
        dtype: torch.dtype | None = None,
    ):
        weight = model.embedding.weight
        self.device, self.reader, self.how = weight.device, model, how
        if dtype is None:
            dtype = autocast_dtype(self.device) or weight.dtype
        self.batch, self.captured = batch, self.device.type == "cuda"
        with torch.inference_mode():
            self.model = DecodingModel(model, batch, dtype, _room(length))
            self.token, self.position = (
                torch.zeros(batch, dtype=torch.int64, device=self.device) for _ in range(2)
            )
            # Draws of every row, and how many it has used: below 0 while it reads its prompt.
            self.draws = torch.zeros(batch, max_new_tokens, dtype=torch.float64, device=self.device)
            self.drawn = torch.zeros_like(self.token)
            self._pending: list[deque[int]] = [deque() for _ in range(batch)]
            self._read: list[int | None] = [None] * batch  # tokens read by a row that is in use
            self._graph: torch.cuda.CUDAGraph | None = None
            if self.captured:
                self._warm_up()
                self._capture()

    # ---------------------------------------------------------------- the step

    def _step(self) -> None:
        """Read ``token`` at ``position`` and put the next ones in their place."""
        with torch.autocast(self.device.type, enabled=False):
            logits = self.model.step(self.token, self.position)
            self.token.copy_(sample(logits, self.how, self._draw()))
            self.position.add_(1)
            if self.model.bounded:  # rows not in use run on, at the end of their caches
                self.position.clamp_(max=self.model.length - 1)

    def _draw(self) -> Tensor | None:
        """Return a number in [0, 1) of every row's stream, [B]."""
        if self.how.temperature == 0:
            return None
        at = self.drawn.clamp(0, self.draws.shape[1] - 1)
        self.drawn.add_(1)
        return self.draws.gather(1, at[:, None])[:, 0]

    def _warm_up(self) -> None:
        """Certify and compile the step's kernels, run it, and forget what it did."""
        verdicts.certifier().certify_together(self._step, self.device)
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.device(self.device), torch.cuda.stream(stream):
            for _ in range(2):
                self._step()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        self.model.clear(torch.arange(self.batch, device=self.device))
        self.token.zero_()
        self.position.zero_()

    def _capture(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(self._graph):
            self._step()

    # ---------------------------------------------------------------- sequences

    @torch.inference_mode()
    def begin(
        self,
        rows: Sequence[int],
        prompts: Sequence[Sequence[int]],
        *,
        seeds: Sequence[int] | None = None,
        tokens_per_pass: int = 8192,
    ) -> None:
        """Begin a new sequence in each of these rows.

        Args:
            rows: as many as prompts.
            prompts: token ids, at least one each, of any lengths.
            seeds: of each sequence's random stream, needed unless the temperature is 0.
            tokens_per_pass: tokens of all prompts together in a forward pass.
        """
        ends = self._read_by_passes([len(prompt) for prompt in prompts])
        self._make_room(max(len(prompt) for prompt in prompts))
        at = torch.tensor(list(rows), device=self.device)
        self.model.clear(at)
        order = sorted(range(len(rows)), key=lambda i: ends[i])
        order = [i for i in order if ends[i] > 0]
        state, done = self.reader.init_state(len(order)) if order else None, 0
        for end in sorted({ends[i] for i in order}):
            tokens = torch.tensor([list(prompts[i][done:end]) for i in order], device=self.device)
            for part in tokens.split(max(1, tokens_per_pass // len(order)), 1):
                _, state = self.reader.hidden(part, state=state)
            ended = sum(ends[i] == end for i in order)
            self.model.load(at[order[:ended]], _rows(state, slice(ended)), end)
            order, state, done = order[ended:], _rows(state, slice(ended, None)), end
        self.token[at] = torch.tensor(
            [prompt[end] for prompt, end in zip(prompts, ends, strict=True)], device=self.device
        )
        self.position[at] = torch.tensor(ends, device=self.device)
        if self.how.temperature > 0:
            self.how.check_seeds(seeds, len(prompts))
            assert seeds is not None
            self.draws[at] = uniforms(seeds, self.draws.shape[1]).to(self.device)
            left = [end + 1 - len(prompt) for prompt, end in zip(prompts, ends, strict=True)]
            self.drawn[at] = torch.tensor(left, device=self.device)
        for row, prompt, end in zip(rows, prompts, ends, strict=True):
            self._pending[row] = deque(prompt[end + 1 :])
            self._read[row] = end

    def _read_by_passes(self, lengths: list[int]) -> list[int]:
        """Count the tokens of each prompt that the forward pass reads; steps read the rest."""
        if not self.captured or (len(set(lengths)) == 1 and lengths[0] > READ_BY_STEPS):
            return [length - 1 for length in lengths]
        return [(length - 1) // READ_BY_STEPS * READ_BY_STEPS for length in lengths]

    def end(self, row: int) -> None:
        """Give up a row's sequence."""
        self._pending[row].clear()
        self._read[row] = None

    def _make_room(self, length: int) -> None:
        if not self.model.bounded or length <= self.model.length:
            return
        self.model.grow(_room(length))
        if self.captured:
            self._capture()

    @torch.inference_mode()
    def burst(self, steps: int) -> list[list[int]]:
        """Return the tokens that ``steps`` steps give every row; fewer while it reads a prompt."""
        if self.model.bounded:
            self._make_room(max((n for n in self._read if n is not None), default=0) + steps)
        given = {
            row: [queue.popleft() for _ in range(min(steps, len(queue)))]
            for row, queue in enumerate(self._pending)
            if queue
        }
        forced = None
        if given:
            padded = torch.full((steps, self.batch), -1)
            for row, own in given.items():
                padded[: len(own), row] = torch.tensor(own)
            forced = padded.to(self.device)
        found = torch.empty(steps, self.batch, dtype=torch.int64, device=self.device)
        for i in range(steps):
            if self._graph is not None:
                self._graph.replay()
            else:
                self._step()
            if forced is not None:
                self.token.copy_(torch.where(forced[i] >= 0, forced[i], self.token))
            found[i] = self.token
        self._read = [None if n is None else n + steps for n in self._read]
        # As numpy's lists: torch's take several times as long, while the device has nothing to do.
        rows = found.cpu().numpy().T.tolist()
        for row, own in given.items():
            del rows[row][: len(own)]
        return rows

    @property
    def steps(self) -> int:
        """Return the steps between two looks at the tokens: a CPU gains nothing by more."""
        return BURST if self.captured else 1

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        eos_id: int | None = None,
        seeds: Sequence[int] | None = None,
        done: Callable[[list[int]], bool] = lambda tokens: False,
        progress: Callable[[int], Any] = lambda count: None,
    ) -> list[list[int]]:
        """Return the tokens that follow each of any number of prompts, without EOS.

        A row that is done takes the next prompt.

        Args:
            prompts: token ids, at least one each, of any lengths.
            max_new_tokens: of a sequence.
            eos_id: the token that ends a sequence; None: none does.
            seeds: of each prompt's random stream, needed unless the temperature is 0.
            done: whether a sequence may stop after these tokens; it is cut there.
            progress: called after every few steps, with the number of prompts completed since.
        """
        found: list[list[int]] = [[] for _ in prompts]
        waiting, owner = deque(range(len(prompts))), [-1] * self.batch
        while waiting or any(i >= 0 for i in owner):
            free = [row for row, i in enumerate(owner) if i < 0]
            if waiting and len(free) >= min(len(waiting), -(-self.batch // REFILL)):
                rows = free[: len(waiting)]
                for row in rows:
                    owner[row] = waiting.popleft()
                taken = [owner[row] for row in rows]
                own = None if seeds is None else [seeds[i] for i in taken]
                self.begin(rows, [prompts[i] for i in taken], seeds=own)
            completed = 0
            for row, tokens in enumerate(self.burst(self.steps)):
                i = owner[row]
                if i >= 0 and _extend(found[i], tokens, max_new_tokens, eos_id, done):
                    owner[row] = -1
                    self.end(row)
                    completed += 1
            progress(completed)
        return found


def _extend(found: list[int], tokens: list[int], limit: int, eos_id: int | None, done) -> bool:
    """Append tokens up to the end of the sequence; return whether it was reached.

    Args:
        found: of the sequence so far; grows.
        tokens: that came after it.
        limit: of ``found``.
        eos_id: ends the sequence, and is left out.
        done: says of ``found`` whether the sequence may stop.
    """
    for token in tokens:
        if token == eos_id:
            return True
        found.append(token)
        if len(found) == limit or done(found):
            return True
    return False


def _room(length: int) -> int:
    """Return the tokens of a cache: powers of two, so that it seldom grows."""
    return max(SHORTEST_CACHE, 1 << (length - 1).bit_length())


def _rows(state: Any, rows: slice) -> Any:
    return tree_map(lambda x: None if x is None else x[rows], state)
