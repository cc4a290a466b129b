"""What the processes of one launch must agree on before there is a process group.

That is the configuration, and who reports.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from pdn.errors import ConfigError
from pdn.runs.launcher import Seat, own_seat, restarts
from pdn.wording import first_line

COMPOSE_TIMEOUT = 300.0  # seconds that the other ranks wait for rank 0's configuration
JOIN_TIMEOUT = 300.0  # seconds from the first rank at the launcher's store to the last one
_FAREWELL = 10.0  # seconds that rank 0 keeps its store open for the others


class Ranks:
    """Joins the processes that torchrun, or a launcher of that environment, starts together.

    Attributes:
        rank: global rank of this process; 0 without a launcher.
        size: number of processes; 1 without a launcher.
    """

    def __init__(self):
        try:
            self.rank = int(os.environ.get("RANK", 0))
            self.size = int(os.environ.get("WORLD_SIZE", 1))
        except ValueError as error:
            raise ConfigError(
                "RANKS",
                f"RANK and WORLD_SIZE in the environment: {error}; expected integers, as torchrun "
                "sets",
            ) from None
        # The digest holds the count of restarts, too: a restarted group must not read what the one
        # before it left in the launcher's store, nor a launch what another one wrote.
        self._seat = own_seat(sys.argv[1:])
        self._seats = f"pdn/{restarts()}/seat"
        self._prefix = f"pdn/{self._seat.launch}"
        self._store: Any = None  # of torch; None until the ranks have met
        # torchrun's agent outlives the ranks; where it serves the store, rank 0 does not
        self._agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._serves = self.rank == 0 and not self._agent

    def agree(self, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return rank 0's ``make()`` on every rank. Collective.

        Raises:
            SystemExit: ``make()`` raised it on rank 0; every rank then ends with its code. Or see
                ``ConfigError``.
            ConfigError: the ranks cannot meet; of a node, whose ranks look in the same place, only
                the first one says so.
        """
        if self.size == 1:
            return make()
        try:
            self._store = _meet(self.rank, JOIN_TIMEOUT)
        except ConfigError as error:
            if os.environ.get("LOCAL_RANK", "0") != "0":
                raise SystemExit(error.exit_code) from None
            raise
        self._take_seat()
        if self.rank == 0:
            return self._tell(make)
        self._store.set_timeout(timedelta(seconds=COMPOSE_TIMEOUT))
        message = json.loads(self._store.get(f"{self._prefix}/config"))
        if "exit_code" in message:
            raise SystemExit(message["exit_code"])
        return message["values"]

    def _take_seat(self) -> None:
        """Take this rank's seat in the launcher's store and wait for the others.

        Ranks of another launch are refused: an orphan of an earlier one on the same port would be
        told the configuration, or tell it.

        Raises:
            ConfigError: the seat is taken, a rank does not come, or one belongs to another launch.
        """
        seats = [f"{self._seats}/{rank}" for rank in range(self.size)]
        mine = self._seat.dump()
        found = self._store.compare_set(seats[self.rank], "", mine)
        if found.decode() != mine:
            raise self._mixed(self.rank, Seat.load(found), "it took this rank's place")
        try:
            self._store.wait(seats, timedelta(seconds=JOIN_TIMEOUT))
        except RuntimeError:
            absent = [rank for rank in range(self.size) if not self._store.check([seats[rank]])]
            raise ConfigError(
                "RANKS",
                f"ranks {', '.join(map(str, absent))} did not come within {JOIN_TIMEOUT:g} s; "
                f"expected {self.size}: see what ended them, and launch again",
            ) from None
        for rank in range(self.size) if self.rank == 0 else (0,):
            other = Seat.load(self._store.get(seats[rank]))
            reason = self._seat.difference(other)
            if reason is not None:
                raise self._mixed(rank, other, reason)

    def _mixed(self, rank: int, other: Seat, reason: str) -> ConfigError:
        return ConfigError(
            "LAUNCH-MIXED",
            f"rank {self.rank} ({self._seat.place}): found rank {rank} ({other.place}) of another "
            f"launch at the same port: {reason}; expected the ranks of one command: end that "
            "process, or launch with another --master-port",
        )

    def _tell(self, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        try:
            values = make()
        except SystemExit as end:
            self._store.set(f"{self._prefix}/config", json.dumps({"exit_code": end.code}))
            raise
        self._store.set(f"{self._prefix}/config", json.dumps({"values": values}))
        return values

    def first_to_report(self) -> bool:
        """Return whether this rank should print why the launch ends: the first that asks does."""
        if self.size == 1 or (self._store is None and not self._agent):
            return True
        with contextlib.suppress(Exception):
            # the launcher, and its store, may be gone: then two reports are better than none
            store = self._store or _meet(self.rank, _FAREWELL)
            return store.add(f"{self._prefix}/reported", 1) == 1
        return True

    def leave(self) -> None:
        """Say that this rank is done.

        Where rank 0 serves the store, it stays until all others are done, so that they can report.
        """
        if self._store is None:
            return
        with contextlib.suppress(Exception):  # as above
            left = self._store.add(f"{self._prefix}/left", 1)
            deadline = time.monotonic() + _FAREWELL
            while self._serves and left < self.size and time.monotonic() < deadline:
                time.sleep(0.05)
                left = self._store.add(f"{self._prefix}/left", 0)


def _meet(rank: int, timeout_s: float):
    """Return the store that the launcher, or else rank 0, serves at MASTER_ADDR:MASTER_PORT."""
    from torch.distributed.rendezvous import rendezvous

    try:
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
    except (ValueError, RuntimeError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = first_line(error)
        if "EADDRINUSE" in str(error):
            raise ConfigError(
                "PORT",
                f"MASTER_PORT: {where} is in use by another process; expected a free port: "
                "launch with torchrun --standalone, or set another --master-port",
            ) from None
        raise ConfigError(
            "RANKS",
            f"rank {rank} cannot meet the others at {where}: {reason}; expected the environment of "
            "torchrun: launch with it",
        ) from None
    return store
