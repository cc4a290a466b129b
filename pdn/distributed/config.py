"""How a run is spread over devices."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pdn.config import Strict
from pdn.distributed.dims import ParallelDims
from pdn.wording import counted

# ``kind`` of earlier versions, whose hsdp had the number of copies beside it: (replicate, shard)
KINDS = {"auto": (1, "auto"), "single": (1, 1), "ddp": ("all", 1), "fsdp": (1, "all")}
Size = Annotated[int, Field(ge=1)]


class ParallelConfig(Strict):
    """Describes the layout of the ranks, and what each does to save memory or time."""

    replicate: Size | Literal["all"]  # copies of the model; all: as many as the ranks make
    shard: Size | Literal["all", "auto"]  # ranks that share a copy; all: those that are left;
    # auto: the same, and no sharding machinery with one process
    # ranks that share a sequence, a piece each, and their copy's parameters; if shard is 1, each
    # has all of these
    context: Size
    activation_checkpointing: Literal["none", "full", "selective"]
    compile: Literal["auto"] | bool  # torch.compile of every block; auto: on a GPU
    reshard_after_forward: bool  # free gathered weights between forward and backward
    cpu_offload: bool  # keep shards and optimiser state in host memory

    @model_validator(mode="before")
    @classmethod
    def _as_recorded_before(cls, values: object) -> object:
        """Read the ``kind`` and ``replicas`` of earlier versions."""
        if not isinstance(values, dict) or not {"kind", "replicas"} <= values.keys():
            return values
        rest = {key: value for key, value in values.items() if key not in ("kind", "replicas")}
        replicate, shard = KINDS.get(values["kind"], (values["replicas"], "all"))
        return {"replicate": replicate, "shard": shard, "context": 1} | rest

    @model_validator(mode="after")
    def _one_open_axis(self) -> Self:
        if self.replicate == "all" and not isinstance(self.shard, int):
            raise ValueError(
                f"replicate = all with shard = {self.shard}; expected a number for one of them"
            )
        return self

    @property
    def needs_mesh(self) -> bool:
        """Return whether a single process is sharded too, as a mesh of one."""
        return "all" in (self.replicate, self.shard)

    def dims(self, world_size: int) -> ParallelDims:
        """Return the axes over so many ranks.

        Raises:
            ValueError: they do not fit.
        """
        _require_divisor("context", self.context, world_size, 1)
        ranks = world_size // self.context
        replicate, shard = self.replicate, self.shard
        if replicate == "all":
            assert isinstance(shard, int)  # ``_one_open_axis``
            _require_divisor("shard", shard, world_size, self.context)
            replicate = ranks // shard
        elif not isinstance(shard, int):
            _require_divisor("replicate", replicate, world_size, self.context)
            shard = ranks // replicate
        found = ParallelDims(
            replicate=replicate, shard=shard, context=self.context, whole=self.shard == 1
        )
        if found.world_size != world_size:
            raise ValueError(
                f"parallel.replicate = {replicate} times parallel.shard = {shard}"
                f"{f' times parallel.context = {self.context}' if self.context > 1 else ''} with "
                f"{counted(world_size, 'process')}; expected torchrun --nproc-per-node "
                f"{found.world_size}, or parallel=auto, ddp, fsdp or hsdp"
            )
        return found


def _require_divisor(axis: str, size: int, ranks: int, context: int) -> None:
    if ranks % (size * context):
        beside = f" times parallel.context = {context}" if context > 1 else ""
        raise ValueError(
            f"parallel.{axis} = {size}{beside} does not divide the number of processes, {ranks}; "
            f"expected torchrun --nproc-per-node with a multiple of {size * context}, or another "
            f"parallel.{axis}"
        )
