"""The ledger's rolling hash, by which runs show that they saw the same tokens in the same order.

They did if and only if their hashes agree. These are pure functions; the trainer gathers the
digests and keeps the hash, the record and the file.
"""

import hashlib

import numpy as np

EMPTY = "0" * 32
"""The hash before the first sample."""


def roll(previous: str, digests) -> str:
    """Return the hash after a step.

    One step of many samples and several steps of fewer differ: compare ledgers of runs with the
    same global batch.

    Args:
        previous: hash before the step (32 hex digits), `EMPTY` at the start.
        digests: int64, the `sample_digests` of one global batch in global sample order (rank 0's
            first), any shape; a numpy array or a CPU tensor.

    Returns:
        128-bit BLAKE2b of the previous hash and the digests, as 32 hex digits.
    """
    state = hashlib.blake2b(bytes.fromhex(previous), digest_size=16)
    state.update(np.ascontiguousarray(np.asarray(digests), dtype="<i8").tobytes())
    return state.hexdigest()
