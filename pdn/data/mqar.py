"""`kind: mqar`: multi-query associative recall (arXiv 2312.04927), generated on the fly.

K key–value pairs, then a query region in which each key comes once more; the label there is its
value, everywhere else there is none. An example is a pure function of (seed, number); training and
validation examples have different numbers.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from pdn.data import order
from pdn.data.batches import Batches
from pdn.data.config import MqarConfig
from pdn.data.history import Law
from pdn.data.pack import IGNORE, digests

VALIDATION = 1 << 40
"""Number of the first validation example."""
KEYS, VALUES, GAPS, FILLER = range(4)


def examples(numbers: np.ndarray, config: MqarConfig, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return examples by number.

    Keys are drawn without replacement from 1…V/2−1, values from V/2…V−1. Key i comes again at
    offset 2·gap_i of the query region; gaps are drawn without replacement from its (T−2K)/2 slots
    with probability ∝ a·j^(a−1) for slot j = 1, 2, ….

    Args:
        numbers: int64 [N].
        config: sizes: T = seq_len, K = num_pairs, V = vocab_size, a = power_a.
        seed: of the run.

    Returns:
        tokens [N, T] and labels [N, T], int64; labels −100 but at the K queries.
    """
    count, length, pairs, half = (
        len(numbers),
        config.seq_len,
        config.num_pairs,
        config.vocab_size // 2,
    )
    keys = 1 + _distinct(numbers, pairs, half - 1, seed, KEYS)
    values = half + _distinct(numbers, pairs, config.vocab_size - half, seed, VALUES)
    slots = (length - 2 * pairs) // 2
    gaps = _gaps(_uniform(numbers, slots, seed, GAPS), pairs, config.power_a)
    if config.random_filler:
        tokens = (_uniform(numbers, length, seed, FILLER) * config.vocab_size).astype(np.int64)
    else:
        tokens = np.zeros((count, length), dtype=np.int64)
    labels = np.full((count, length), IGNORE, dtype=np.int64)
    tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
    at = 2 * pairs + 2 * gaps
    np.put_along_axis(tokens, at, keys, axis=1)
    np.put_along_axis(labels, at, values, axis=1)
    return tokens, labels


def _distinct(numbers: np.ndarray, draws: int, domain: int, seed: int, what: int) -> np.ndarray:
    """Draw `draws` different integers below `domain` for each example: int64 [N, draws]."""
    keys = np.stack([_bits(numbers, 1, seed, what, turn)[:, 0] for turn in range(order.ROUNDS)])
    indices = np.tile(np.arange(draws), len(numbers))
    return order.permute_with(indices, domain, np.repeat(keys, draws, axis=1)).reshape(
        len(numbers), draws
    )


def _gaps(uniform: np.ndarray, draws: int, power: float) -> np.ndarray:
    """Draw weighted slots without replacement and return them in the order of drawing.

    The slots are those of the smallest exponential clocks (Efraimidis, Spirakis).
    """
    rates = power * np.arange(1, uniform.shape[1] + 1) ** (power - 1)
    clocks = -np.log1p(-uniform) / rates
    first = np.argpartition(clocks, draws - 1, axis=1)[:, :draws]
    return np.take_along_axis(
        first, np.argsort(np.take_along_axis(clocks, first, axis=1), axis=1), axis=1
    )


def _bits(numbers: np.ndarray, width: int, seed: int, what: int, turn: int = 0) -> np.ndarray:
    """Draw random uint64 [N, width] from (seed, what, turn, number, column)."""
    base = order.round_keys(f"mqar/{seed}/{what}/{turn}")
    rows = order.mix(numbers.astype(np.uint64) + base[0])
    return order.mix(
        order.mix(rows[:, None] + np.arange(width, dtype=np.uint64)[None] * base[1]) + base[2]
    )


def _uniform(numbers: np.ndarray, width: int, seed: int, what: int) -> np.ndarray:
    """Draw float64 [N, width] in [0, 1)."""
    return (_bits(numbers, width, seed, what) >> np.uint64(11)).astype(np.float64) * 2.0**-53


class MqarData(Batches):
    """Gives `train_examples` examples, reordered each epoch, and `validation_examples` others.

    See `TrainingData`.
    """

    eos_id = 0
    tokenizer_path = None

    def __init__(
        self, config: MqarConfig, *, global_batch_size: int, seed: int, rank: int, world_size: int
    ):
        super().__init__(
            config, global_batch_size=global_batch_size, rank=rank, world_size=world_size
        )
        self._seed = seed
        self.vocab_size = config.vocab_size
        self.fingerprint = {"order_version": order.VERSION, "seed": seed, **config.identity()}

    def record(self, law: Law) -> dict:
        return {
            **self.fingerprint,
            "global_batch_size": law.global_batch_size,
            "lr_scale": law.lr_scale,
        }

    @property
    def tokens_available(self) -> int:
        return self._config.train_examples * self.seq_len

    def epochs(self, samples: int) -> dict[str, float | None]:
        return {"mqar": samples / self._config.train_examples}

    def describe(self, planned_samples: int | None = None) -> str:
        c = self._config
        planned = (
            ""
            if planned_samples is None
            else f"; planned {self.epochs(planned_samples)['mqar']:.2f} epochs"
        )
        return (
            f"mqar: {c.num_pairs} pairs in {c.seq_len} tokens, vocabulary {c.vocab_size:,}, "
            f"{c.train_examples:,} examples{planned}; validation {c.validation_examples:,} examples"
        )

    def origin(self, sample: int) -> tuple[str, int, int | None]:
        return "mqar", sample, sample // self._config.train_examples

    def samples(self, numbers: np.ndarray, shape: tuple[int, int]) -> dict[str, np.ndarray]:
        total = self._config.train_examples
        epochs, places = np.divmod(numbers, total)
        found = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            inside = epochs == epoch
            found[inside] = order.permute(places[inside], total, f"{self._seed}/mqar/{epoch}")
        tokens, labels = examples(found, self._config, self._seed)
        marks = digests(np.concatenate([tokens, labels - IGNORE], axis=1))
        return {
            "tokens": tokens.reshape(*shape, -1),
            "labels": labels.reshape(*shape, -1),
            "sample_digests": marks.reshape(shape),
        }

    def validation(
        self, *, batch_size: int, max_samples: int | None, name: None = None, spread: bool = False,
        carried: bool = False,
    ) -> Iterator[dict[str, Tensor]]:  # fmt: skip
        """Yield batches as `TrainingData.validation` does; the first ones are as good as any."""
        total = self._config.validation_examples
        total = total if max_samples is None else min(total, max_samples)
        for first in range(
            self._rank * batch_size, self._rank * batch_size + total, self._world * batch_size
        ):
            numbers = np.arange(first, first + batch_size)
            tokens, labels = examples(VALIDATION + numbers, self._config, self._seed)
            labels[numbers >= total] = IGNORE
            yield self._tensors({"tokens": tokens, "labels": labels})

    def close(self) -> None:
        """Do nothing: no file is open."""
