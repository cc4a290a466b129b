"""The order of the samples: a pure function of (key, epoch, index) in constant memory.

There is no shuffle buffer. `permute` is a keyed permutation of range(n): an alternating Feistel
network on a grid of a × b >= n cells, a and b near sqrt(n), with cycle walking for the at most
2·sqrt(n) + 1 cells outside. `Schedule` interleaves the sources of a mixture.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from fractions import Fraction

import numpy as np

from pdn.errors import DataError

VERSION = 1
"""Changes when the same key gives another order."""

ROUNDS = 8
MAX_PERIOD = 1 << 16
_M1, _M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def round_keys(key: str) -> np.ndarray:
    """Return the `ROUNDS` random uint64 that `key` names."""
    return np.frombuffer(
        hashlib.blake2b(key.encode(), digest_size=8 * ROUNDS).digest(), dtype="<u8"
    )


def mix(x: np.ndarray) -> np.ndarray:
    """Apply the finaliser of SplitMix64 (Steele, Lea, Flood 2014) in place."""
    x ^= x >> np.uint64(30)
    x *= _M1
    x ^= x >> np.uint64(27)
    x *= _M2
    x ^= x >> np.uint64(31)
    return x


def permute(indices: np.ndarray, n: int, key: str) -> np.ndarray:
    """Return the images of `indices` under the permutation of range(n) that `key` names.

    Args:
        indices: int64 [N], each in [0, n).
        n: size of the domain, from 1 to 2**62.
        key: any string; another key is another permutation.

    Returns:
        int64 [N].
    """
    return permute_with(
        indices, n, np.broadcast_to(round_keys(key)[:, None], (ROUNDS, len(indices)))
    )


def permute_with(indices: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Permute as `permute` does, with round keys of its own for each index.

    Args:
        indices: int64 [N], each in [0, n).
        n: size of the domain, from 1 to 2**62.
        keys: uint64 [ROUNDS, N].
    """
    b = np.uint64(math.isqrt(n - 1) + 1)
    a = np.uint64(-(-n // int(b)))
    found = indices.astype(np.uint64)
    todo = np.arange(len(found))
    while len(todo):
        high, low = np.divmod(found[todo], b)
        for r in range(0, ROUNDS, 2):
            high = (high + mix(low + keys[r, todo]) % a) % a
            low = (low + mix(high + keys[r + 1, todo]) % b) % b
        found[todo] = high * b + low
        todo = todo[found[todo] >= np.uint64(n)]
    return found.astype(np.int64)


class Schedule:
    """Tells which source gives the i-th sample of a mixture, and which of its samples it is.

    Earliest deadline first over unit jobs with release floor(k/w) and deadline ceil((k+1)/w): the
    schedule exists and keeps every prefix within one sample of its weights (Baruah, Cohen, Plaxton,
    Varvel 1996, one processor). It repeats after the common denominator of the weights; weights
    without one below 65,536 are rounded to 65,536ths, and the guarantee holds for the rounded ones.

    Args:
        weights: by source name, positive; their sum is divided out.
    """

    def __init__(self, weights: dict[str, float]):
        bad = {k: w for k, w in weights.items() if not (math.isfinite(w) and w > 0)}
        if bad:
            raise DataError(
                "MIXTURE-WEIGHT",
                f"data.sources: weights must be positive and finite; found {bad}; leave a source "
                "out instead",
            )
        exact = [Fraction(str(w)) for w in weights.values()]
        shares = [w / sum(exact) for w in exact]
        period = math.lcm(*(s.denominator for s in shares))
        if period > MAX_PERIOD:
            period, shares = MAX_PERIOD, _round_shares(shares, MAX_PERIOD)
        self.period = period
        self.quota = np.array([int(s * period) for s in shares], dtype=np.int64)
        if (self.quota == 0).any():
            low = [k for k, q in zip(weights, self.quota) if q == 0]
            raise DataError(
                "MIXTURE-WEIGHT",
                f"data.sources: weights of {low} are below 1/{2 * MAX_PERIOD} of the total; raise "
                "or remove them",
            )
        self._source, self._rank = self._table()

    def _table(self) -> tuple[np.ndarray, np.ndarray]:
        source, rank = np.empty(self.period, np.int16), np.empty(self.period, np.int64)
        quota = self.quota.tolist()
        waiting = [(0, j, 0) for j in range(len(quota))]  # (release, source, k)
        heapq.heapify(waiting)
        ready: list[tuple[int, int, int]] = []  # (deadline, source, k)
        for t in range(self.period):
            while waiting and waiting[0][0] <= t:
                _, j, k = heapq.heappop(waiting)
                heapq.heappush(ready, (-(-(k + 1) * self.period // quota[j]), j, k))
            _, j, k = heapq.heappop(ready)
            source[t], rank[t] = j, k
            if k + 1 < quota[j]:
                heapq.heappush(waiting, ((k + 1) * self.period // quota[j], j, k + 1))
        return source, rank

    def locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return source numbers [N] and sample numbers within the source [N].

        `indices` [N] are numbers of the mixture's samples.
        """
        turn, place = np.divmod(indices, self.period)
        source = self._source[place].astype(np.int64)
        return source, turn * self.quota[source] + self._rank[place]

    def counts(self, stop: int) -> np.ndarray:
        """Count how many of the mixture's first `stop` samples come from each source."""
        turns, rest = divmod(stop, self.period)
        return turns * self.quota + np.bincount(self._source[:rest], minlength=len(self.quota))


def _round_shares(shares: list[Fraction], period: int) -> list[Fraction]:
    """Round shares to multiples of 1/period that sum to one, by largest remainders."""
    floors = [int(s * period) for s in shares]
    by_rest = sorted(range(len(shares)), key=lambda j: (floors[j] - shares[j] * period, j))
    for j in by_rest[: period - sum(floors)]:
        floors[j] += 1
    return [Fraction(f, period) for f in floors]
