"""Exact, elastic training data: text, prepared shards, mixtures and streams behind one iterator.

`open_data` is the entry; `pdn.data.config` holds the configuration. Importing this package imports
neither torch nor the tokenizers, so that worker processes start quickly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pdn.data.config import DataConfig
    from pdn.data.loader import TrainingData
    from pdn.data.mqar import MqarData

__all__ = ["open_data"]


def open_data(
    config: DataConfig,
    *,
    global_batch_size: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[str], None] | None = None,
    recorded: dict[str, object] | None = None,
) -> TrainingData | MqarData:
    """Open the data of a run.

    The first process on a node prepares what is missing; the others wait for it.

    Args:
        config: a parsed data config.
        global_batch_size: samples of an optimiser step over all ranks.
        seed: of the order of the samples.
        rank, world_size: of this process among the data-parallel ones.
        recorded: the fingerprint in the checkpoint of a run that is continued: it gets the data of
            the rules that it was begun with.
        progress: called with a line of text now and then while data are prepared or waited for.

    Raises:
        pdn.errors.DataError: the data or the tokenizer are missing, damaged or do not fit (exit
            code 65).
        pdn.errors.DataStorageError: reading or writing failed (exit code 74).
    """
    from pdn.data.open import build

    return build(
        config,
        global_batch_size=global_batch_size,
        seed=seed,
        rank=rank,
        world_size=world_size,
        progress=progress,
        recorded=recorded,
    )
