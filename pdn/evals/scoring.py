"""Log-likelihoods and continuations of token sequences: what evaluations ask of a model.

The sequences are shared out over the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from pdn.distributed.collectives import gather_or_raise
from pdn.distributed.copies import HostCopy, sent
from pdn.distributed.world import World
from pdn.inference.decode import GREEDY, Decoder
from pdn.inference.sampling import Sampling
from pdn.models.language_model import LanguageModel

T = TypeVar("T")
LOGIT_ELEMENTS = 2**26  # of one slice: 256 MiB in float32
# packed batches are rounded up to multiples of these, so that few shapes occur
ROUND_TOKENS, ROUND_DOCUMENTS = 256, 32
UNBOUNDED = 2**31  # tokens, of ``Scorer.whole``
FULL_TOKENS = 2**15  # of a pass, in which a GPU has work for longer than its launches take


@dataclass(frozen=True)
class Scorer:
    """Scores and continues texts with a whole model on this rank's device.

    Every rank has one and calls the same methods with the same arguments.

    Args:
        max_length: tokens that a forward pass sees, the training's length if nothing else is said.
            Longer sequences lose their beginning, as in lm-eval.
        batch_size: sequences of a forward pass, of similar lengths. On a GPU a model without
            attention reads as many tokens in a pass as so many of the longest ones have, sequence
            after sequence without padding; of short ones, which launches would hold up, as many
            as fill the device, but no more than so many of ``max_length``.
        path: chunkwise runs whole sequences; recurrent feeds them token by token through the state,
            as decoding does.
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
        """Return the same without a longest length: for tests of what happens beyond it."""
        return replace(self, max_length=UNBOUNDED)

    def loglikelihoods(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[tuple[float, bool]]:
        """Return log p(continuation | context) in nats, and whether greedy decoding yields it.

        Raises:
            ValueError: an empty context or continuation, or a continuation longer than
                ``max_length``.
        """
        for context, continuation in pairs:
            if not context or not 0 < len(continuation) <= self.max_length:
                raise ValueError(
                    f"{len(context)} tokens of context, {len(continuation)} of continuation: "
                    "expected at least one of each, and no more than max_length = "
                    f"{self.max_length} of the latter"
                )
        lengths = [min(len(a) + len(b), self.max_length) for a, b in pairs]
        order = sorted(range(len(pairs)), key=lambda i: -(len(pairs[i][0]) + len(pairs[i][1])))
        if self.packs and pairs:
            batches = _full_batches(order, lengths, self._tokens_of_a_pass(lengths))
        else:
            batches = _batches(order, self.batch_size)
        return self._shared_out(pairs, batches, self._score_all)

    def _tokens_of_a_pass(self, lengths: list[int]) -> int:
        """Return the tokens of a packed batch, but a batch for each rank at least."""
        longest = max(lengths)
        usual = self.batch_size * longest
        if self.max_length != UNBOUNDED:
            usual = max(usual, min(self.batch_size * self.max_length, FULL_TOKENS))
        return min(usual, max(longest, -(-sum(lengths) // self.world.size)))

    @property
    def packs(self) -> bool:
        """Return whether sequences follow each other in one row.

        Not with attention, which would see all of the row, nor on a CPU, which gains nothing.
        """
        attends = any(mixer.kind == "attention" for mixer in self.model.config.mixers.values())
        return self.device.type == "cuda" and self.path == "chunkwise" and not attends

    def continuations(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        eos_id: int | None,
        done: Callable[[list[int]], bool] = lambda tokens: False,
        how: Sampling = GREEDY,
        seeds: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Return the tokens that follow each prompt, without EOS.

        Args:
            done: whether a sequence may stop after these tokens; it is cut there.
            how: the next token is chosen.
            seeds: of each prompt's samples, which depend on nothing else of the batch; needed
                unless the temperature is 0.
        """
        how.check_seeds(seeds, len(prompts))
        items = list(zip(prompts, seeds or [0] * len(prompts), strict=True))

        def decode(share: list[list], progress: Callable[[int], None]) -> list[list[list[int]]]:
            mine = [item for batch in share for item in batch]
            if not mine:
                return []
            with self._precision():
                rows = min(self.batch_size, len(mine))
                decoder = Decoder(self.model, rows, how=how, max_new_tokens=max_new_tokens)
                found = decoder.complete(
                    [prompt for prompt, _ in mine],
                    max_new_tokens=max_new_tokens,
                    eos_id=eos_id,
                    seeds=[seed for _, seed in mine],
                    done=done,
                    progress=progress,
                )
            each = iter(found)
            return [[next(each) for _ in batch] for batch in share]

        order = sorted(range(len(items)), key=lambda i: -len(prompts[i]))
        return self._shared_out(items, _batches(order, 1), decode)

    def _shared_out(
        self,
        items: Sequence,
        batches: list[list[int]],
        work: Callable[[list[list], Callable[[int], None]], list[list[T]]],
    ) -> list[T]:
        """Return the results of all items, on every rank.

        Args:
            batches: numbers of items; rank r does every world-size-th one from the r-th on.
            work: from a rank's batches, and a function that it calls now and then with the number
                of items done since, to the results of each.
        """

        def mine() -> list[list[T]]:
            share = batches[self.world.world_rank :: self.world.size]
            hidden = None if self.world.is_main else True  # None: shown in a terminal only
            with tqdm(total=sum(map(len, share)), disable=hidden, leave=False) as bar:

                def progress(count: int) -> None:
                    bar.update(count)
                    self.alive()
                    self.check()

                progress(0)
                return work([[items[i] for i in batch] for batch in share], progress)

        results = gather_or_raise(mine)
        found: list = [None] * len(items)
        for number, batch in enumerate(batches):
            for i, result in zip(
                batch, results[number % self.world.size][number // self.world.size], strict=True
            ):
                found[i] = result
        return found

    def _score_all(self, share: list[list], progress: Callable[[int], None]) -> list[list]:
        results: list[list] = []
        under_way: tuple[HostCopy, int] | None = None

        def read(sums: HostCopy, count: int) -> None:
            results.append([(total, misses == 0) for total, misses in sums.read()])
            progress(count)

        for batch in share:  # read when the device has the next one to do
            before, under_way = under_way, (self._score(batch), len(batch))
            if before is not None:
                read(*before)
        if under_way is not None:
            read(*under_way)
        return results

    @torch.inference_mode()
    def _score(self, batch: list[tuple[Sequence[int], Sequence[int]]]) -> HostCopy:
        """Launch a batch: [N, 2], of each sequence its sum and the tokens that are not likeliest.

        Nothing waits for the device here.
        """
        rows = [
            ([*context, *continuation][-(self.max_length + 1) :], len(continuation))
            for context, continuation in batch
        ]
        inputs, wanted, cu_seqlens = (self._packed if self.packs else self._padded)(rows)
        labels = [token for tokens, counted in rows for token in tokens[-counted:]]
        owner = torch.arange(len(rows)).repeat_interleave(torch.tensor([n for _, n in rows]))
        with self._precision():
            hidden = self._hidden(inputs, cu_seqlens).flatten(0, 1)
            log_probs, greedy = self._read_out(
                hidden[sent(torch.tensor(wanted), self.device)],
                sent(torch.tensor(labels), self.device),
            )
        of_token = torch.stack([log_probs.double(), (~greedy).double()], 1)
        found = torch.zeros(len(rows), 2, dtype=torch.float64, device=self.device)
        return HostCopy(found.index_add_(0, sent(owner, self.device), of_token))

    def _padded(self, rows: list[tuple[list[int], int]]) -> tuple[Tensor, list[int], None]:
        """Lay out a sequence a row, padded on the right, where nothing that is read can see it.

        Returns the inputs and, of the flattened ones, those that are read, sequence by sequence.
        """
        width = max(len(tokens) for tokens, _ in rows) - 1
        inputs = torch.zeros(len(rows), width, dtype=torch.int64)
        wanted: list[int] = []
        for i, (tokens, counted) in enumerate(rows):
            inputs[i, : len(tokens) - 1] = torch.tensor(tokens[:-1])
            end = i * width + len(tokens) - 1
            wanted += range(end - counted, end)
        return sent(inputs, self.device), wanted, None

    def _packed(self, rows: list[tuple[list[int], int]]) -> tuple[Tensor, list[int], Tensor]:
        """Lay out all sequences in one row, with the boundaries between them."""
        inputs: list[int] = []
        wanted: list[int] = []
        ends = [0]
        for tokens, counted in rows:
            inputs += tokens[:-1]
            wanted += range(len(inputs) - counted, len(inputs))
            ends.append(len(inputs))
        inputs += [0] * (-len(inputs) % ROUND_TOKENS)  # padding: a document of its own
        ends += [len(inputs)] * (1 + -len(ends) % ROUND_DOCUMENTS)
        boundaries = torch.tensor(ends, dtype=torch.int32)
        return sent(torch.tensor([inputs]), self.device), wanted, sent(boundaries, self.device)

    def _hidden(self, inputs: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        if self.path == "chunkwise":
            return self.model.hidden(inputs, cu_seqlens=cu_seqlens)[0]
        state, parts = self.model.init_state(len(inputs)), []
        for token in inputs.split(1, 1):
            hidden, state = self.model.hidden(token, state=state)
            parts.append(hidden)
        return torch.cat(parts, 1)

    def _read_out(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probabilities of the labels [N] and whether they are the likeliest.

        ``hidden`` [N, D] is read in slices of rows.
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


def _batches(order: list[int], size: int) -> list[list[int]]:
    """Split ``order`` into batches of ``size`` items."""
    return [order[i : i + size] for i in range(0, len(order), size)]


def _full_batches(order: list[int], lengths: list[int], tokens: int) -> list[list[int]]:
    """Split items in this order into batches of at most ``tokens`` together, at least one item."""
    batches: list[list[int]] = []
    room = 0
    for i in order:
        if lengths[i] > room:
            batches.append([])
            room = tokens
        batches[-1].append(i)
        room -= lengths[i]
    return batches
