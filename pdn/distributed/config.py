"""How a run is spread over devices."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pdn.config import Strict


class ParallelConfig(Strict):
    kind: Literal[
        "auto", "single", "ddp", "fsdp", "hsdp"
    ]  # auto: single with one process, else fsdp
    replicas: int = Field(ge=1)  # hsdp: groups of ranks that each hold the whole model
    activation_checkpointing: Literal["none", "full", "selective"]
    compile: Literal["auto"] | bool  # torch.compile of every block; auto: on a GPU
    reshard_after_forward: bool  # fsdp, hsdp: free gathered weights between forward and backward
    cpu_offload: bool  # fsdp, hsdp: keep shards and optimiser state in host memory
