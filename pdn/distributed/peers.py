"""Names the rank that is gone, where an exchange with it fails: torch tells of a socket only."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from pdn.distributed.collectives import is_distributed
from pdn.distributed.watchdog import own_store, place_of, pulses
from pdn.errors import PdnError

SURVEY_S = 3.0  # for the other ranks to notice, too; one that is gone is silent until then
_STORE_S = 6.0  # a store that has not answered by then hangs
_POLL_S = 0.1


class PeerError(PdnError):
    """Tells that an exchange failed since another rank is gone."""

    exit_code = 70


def is_broken_exchange(error: BaseException | None) -> bool:
    """Return whether an error, or what it arose from, is a collective's that lost a peer.

    A ``PdnError`` is not: it says what there is to say.
    """
    seen: set[int] = set()
    while error is not None and not isinstance(error, PdnError) and id(error) not in seen:
        seen.add(id(error))
        if _lost_peer(error):
            return True
        inner = getattr(error, "failures", None)  # of torch's checkpoints: rank → (error, trace)
        if isinstance(inner, dict) and any(is_broken_exchange(e) for e, _ in inner.values()):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def _lost_peer(error: BaseException) -> bool:
    text = str(error)
    return (
        (isinstance(error, RuntimeError) and "gloo/transport/" in text)
        or (isinstance(error, dist.DistBackendError) and "ncclRemoteError" in text)
        or isinstance(error, dist.DistNetworkError)
    )


def tell_peers(reason: str) -> None:
    """Leave word why this rank ends, for those whose exchanges with it will fail."""
    if is_distributed():
        _ask(lambda store: store.set(_word_of(dist.get_rank()), reason))


def explain(error: BaseException) -> PeerError:
    """Return what a broken exchange means: which rank is gone, and what to do.

    Takes up to ``SURVEY_S`` seconds where there are more than two ranks.
    """
    reason = " ".join(str(error).split())
    if not is_distributed():
        return PeerError("PEER", f"the exchange with the other ranks broke: {reason[:200]}")
    rank = dist.get_rank()
    said = _ask(_survey)
    again = "Launch again: the run continues from its last checkpoint"
    if said is None:
        said = (
            "the ranks' store does not answer: rank 0, the launcher or their node is gone; see "
            "what ended it"
        )
    return PeerError("PEER", f"rank {rank}: {said}. {again}")


def _survey(store: Store) -> str:
    """Say who is gone: who neither leaves word nor goes on."""
    rank, size = dist.get_rank(), dist.get_world_size()
    if not store.check([_word_of(rank)]):
        store.set(_word_of(rank), "")
    others = [other for other in range(size) if other != rank]
    before, deadline = pulses(store, others), time.monotonic() + SURVEY_S
    while True:
        silent = [other for other in others if not store.check([_word_of(other)])]
        if len(silent) <= 1 or time.monotonic() > deadline:
            break
        time.sleep(_POLL_S)
    words = {other: store.get(_word_of(other)).decode() for other in others if other not in silent}
    for other, word in words.items():
        if word:
            return f"rank {other} has failed: {word}; see its output"
    after = pulses(store, silent) if len(silent) > 1 else {}
    gone = [other for other in silent if after.get(other) == before.get(other)] or silent
    if not gone:
        return "the connection to another rank broke, and all of them are there; see the network"
    seen = f", last seen {place_of(before[gone[0]])}" if before.get(gone[0]) else ""
    named = f"rank {gone[0]} is" if len(gone) == 1 else f"ranks {', '.join(map(str, gone))} are"
    return (
        f"{named} gone{seen}, without a word: killed (for want of memory, by a scheduler, by hand) "
        "or lost with the machine; see dmesg there and the scheduler's log"
    )


def _ask(question: Callable[[Store], object]) -> str | None:
    """Return what a question to the ranks' store answers; None if it does not in time."""
    answers: list = []

    def work() -> None:
        with contextlib.suppress(RuntimeError):  # gone, with rank 0 or the launcher
            answers.append(question(own_store()))

    asking = threading.Thread(target=work, daemon=True)
    asking.start()
    asking.join(SURVEY_S + _STORE_S)
    return answers[0] if answers else None


def _word_of(rank: int) -> str:
    return f"pdn/ended/{rank}"
