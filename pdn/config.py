"""The whole configuration of a run: typed, strict, and checked across fields before anything is built.

Hydra composes YAML into a plain dict; ``RunConfig.model_validate`` parses it. There are no defaults here: every key is
visible in ``configs/`` with its unit.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from data.config import DataConfig
from pdn.mixers import AnyMixer
from pdn.mixers.base import Strict

Steps = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class RecipeConfig(Strict):
    """What this size is usually trained with; ``train.yaml`` and ``data/`` refer to it by interpolation."""

    seq_len: int = Field(ge=1)  # tokens
    global_batch_size: int = Field(ge=1)  # sequences per optimiser step
    micro_batch_size: int = Field(ge=1)  # sequences per device and forward pass
    steps: Steps
    warmup_steps: int = Field(ge=0)
    lr: Positive
    weight_decay: float = Field(ge=0)


class ModelConfig(Strict):
    """A size and a repeating pattern of mixers."""

    name: str
    vocab_size: int | None = Field(ge=2)  # null: that of the data's tokenizer
    d_model: int = Field(ge=1)
    num_layers: int = Field(ge=1)
    num_heads: int = Field(ge=1)  # the mixer presets refer to these two
    head_dim: int = Field(ge=1)
    intermediate_size: int = Field(ge=0)  # of the SwiGLU; 0: blocks without MLP
    norm_eps: Positive
    mixers: dict[str, AnyMixer] = Field(min_length=1)
    pattern: list[str] = Field(min_length=1)  # names from ``mixers``, repeated over the layers
    recipe: RecipeConfig

    @model_validator(mode="after")
    def _known_mixers(self):
        for name in self.pattern:
            if name not in self.mixers:
                raise ValueError(
                    f"pattern = {self.pattern} names {name!r}; expected one of model.mixers: {', '.join(self.mixers)}"
                )
        for name in self.mixers:
            if name not in self.pattern:
                raise ValueError(f"model.mixers.{name} is not used by pattern = {self.pattern}; remove it or name it there")
        return self

    @property
    def layers(self) -> list[str]:
        """The mixer's name of each layer."""
        return [self.pattern[i % len(self.pattern)] for i in range(self.num_layers)]

    def num_params(self) -> int:
        """Trainable parameters, with the tied embedding counted once."""
        per_block = self.d_model + (self.d_model + 3 * self.d_model * self.intermediate_size if self.intermediate_size else 0)
        mixers = sum(self.mixers[name].num_params(self.d_model) for name in self.layers)
        return self.vocab_size * self.d_model + self.d_model + self.num_layers * per_block + mixers

    def flops_per_token(self, seq_len: int) -> int:
        """Forward and backward FLOPs for one token of training, recomputation not counted."""
        mlp = 6 * self.d_model * self.intermediate_size
        mixers = sum(self.mixers[name].flops_per_token(self.d_model, seq_len) for name in self.layers)
        return 3 * (2 * self.vocab_size * self.d_model + self.num_layers * mlp + mixers)


class AdamWConfig(Strict):
    kind: Literal["adamw"]
    lr: Positive  # peak
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)]  # a list in YAML
    eps: Positive
    weight_decay: float = Field(ge=0)  # of matrices; never of norms, biases, A_log, dt_bias, mu


class ScheduleConfig(Strict):
    """Linear warm-up, then constant, cosine decay, or constant with a linear decay at the end (WSD)."""

    kind: Literal["constant", "cosine", "wsd"]
    warmup_steps: int = Field(ge=0)
    decay_steps: int = Field(ge=0)  # wsd: length of the last phase; cosine and constant: 0
    initial_lr_fraction: Fraction  # of the peak, where the warm-up starts
    final_lr_fraction: Fraction  # of the peak, at trainer.steps

    @model_validator(mode="after")
    def _decay_phase(self):
        if (self.kind == "wsd") != (self.decay_steps > 0):
            expected = "at least 1" if self.kind == "wsd" else "0"
            raise ValueError(f"decay_steps = {self.decay_steps}; expected {expected} for kind = {self.kind}")
        return self


class ParallelConfig(Strict):
    kind: Literal["auto", "single", "ddp", "fsdp", "hsdp"]  # auto: single with one process, else fsdp
    replicas: int = Field(ge=1)  # hsdp: groups of ranks that each hold the whole model
    activation_checkpointing: Literal["none", "full", "selective"]
    compile: Literal["auto"] | bool  # torch.compile of every block; auto: on a GPU
    reshard_after_forward: bool  # fsdp, hsdp: free gathered weights between forward and backward
    cpu_offload: bool  # fsdp, hsdp: keep shards and optimiser state in host memory


class OpsConfig(Strict):
    backend: Literal["auto", "reference", "chunkwise", "triton", "fla"]


class CheckpointConfig(Strict):
    every: Steps  # steps
    keep_last: int = Field(ge=1)
    keep_every: Steps | None  # steps; null: only the last ones stay
    asynchronous: bool


class TrainerConfig(Strict):
    steps: Steps  # the schedule's horizon
    stop_at: Steps | None  # end this launch early, after this many steps in total
    global_batch_size: int = Field(ge=1)  # sequences per optimiser step, over all devices
    micro_batch_size: int = Field(ge=1)  # sequences per device and forward pass
    grad_clip: Positive  # of the global gradient norm
    device: Literal["auto", "cpu", "cuda"]
    precision: Literal["auto", "fp32", "bf16"]  # of compute; parameters and reductions are float32
    deterministic: bool
    log_every: Steps  # steps
    stall_timeout: Positive  # seconds without a finished step before the run gives up and names the slow rank
    divergence_check_every: Steps | None  # steps; ddp, hsdp: compare the replicas' parameters
    spike_threshold: Positive | None  # nats above the recent median loss: rewind and skip that data; null: never
    dry_run: bool


class EvalConfig(Strict):
    every: Steps | None  # steps; null: never
    at_start: bool
    batch_size: int = Field(ge=1)  # sequences per device
    max_samples: int | None = Field(ge=1)  # sequences of each validation set, spread evenly over it; null: all
    suite: str | None  # tasks of configs/eval/suites; null: none
    tasks: list[str]  # more tasks, by name
    tasks_every: Steps | None  # steps between evaluations of the tasks; null: after the last step only
    limit: int | None = Field(ge=1)  # documents of each of lm-eval's tasks; null: all
    data_dir: str | None  # folder with local files of lm-eval's tasks; null: the Hugging Face hub

    @model_validator(mode="after")
    def _tasks_to_repeat(self):
        if self.tasks_every is not None and self.suite is None and not self.tasks:
            raise ValueError(f"tasks_every = {self.tasks_every} without suite and tasks; expected one of them, or null")
        return self


class LoggerConfig(Strict):
    kind: Literal["none", "wandb"]
    project: str


class RunConfig(Strict):
    name: str | None  # of the run's directory; null: model, data and a hash of what defines the run
    seed: int = Field(ge=0, lt=2**31)
    output_dir: str = Field(min_length=1)
    resume: Annotated[str, Field(pattern=r"^(auto|never|step:\d+)$")]
    init_from: Annotated[str, Field(min_length=1)] | None  # a checkpoint or an exported folder to take the weights from
    model: ModelConfig
    data: DataConfig
    optim: AdamWConfig
    schedule: ScheduleConfig
    parallel: ParallelConfig
    trainer: TrainerConfig
    checkpoint: CheckpointConfig
    eval: EvalConfig
    logger: LoggerConfig
    ops: OpsConfig

    @field_validator("name")
    @classmethod
    def _stays_below_output_dir(cls, name: str | None) -> str | None:
        if name is not None and (name != name.strip() or not name.isprintable() or {"", ".", ".."} & set(name.split("/"))):
            raise ValueError(
                f"found {name!r}; expected the name of a directory below output_dir, without .., line breaks, spaces at its ends"
            )
        return name

    @model_validator(mode="after")
    def _fits_together(self):
        t = self.trainer
        if self.schedule.warmup_steps + self.schedule.decay_steps > t.steps:
            raise ValueError(
                f"schedule.warmup_steps + schedule.decay_steps = {self.schedule.warmup_steps + self.schedule.decay_steps} "
                f"exceed trainer.steps = {t.steps}; expected at most that"
            )
        if t.stop_at is not None and t.stop_at > t.steps:
            raise ValueError(f"trainer.stop_at = {t.stop_at} exceeds trainer.steps = {t.steps}; expected at most that")
        if t.global_batch_size % t.micro_batch_size:
            raise ValueError(_not_divisible(t.global_batch_size, t.micro_batch_size, "trainer.micro_batch_size"))
        return self

    def check_world_size(self, world_size: int) -> None:
        """Raise ValueError unless the global batch divides into whole micro-batches on every rank."""
        t, p = self.trainer, self.parallel
        if t.global_batch_size % (t.micro_batch_size * world_size):
            unit = f"trainer.micro_batch_size x {world_size} processes"
            message = _not_divisible(t.global_batch_size, t.micro_batch_size * world_size, unit)
            if t.global_batch_size % world_size == 0:
                share = t.global_batch_size // world_size
                largest = next(size for size in range(min(t.micro_batch_size, share), 0, -1) if share % size == 0)
                message += f", or trainer.micro_batch_size={largest}"
            raise ValueError(message)
        if p.kind == "single" and world_size > 1:
            raise ValueError(f"parallel.kind = single with {world_size} processes; expected auto, ddp, fsdp or hsdp")
        if p.kind == "hsdp" and world_size % p.replicas:
            raise ValueError(
                f"parallel.replicas = {p.replicas} does not divide the number of processes, {world_size}; "
                f"expected torchrun --nproc-per-node with a multiple of {p.replicas}, or another parallel.replicas"
            )

    def identity(self) -> dict:
        """What defines the run's result; the default name hashes it, and a resume is refused where it differs.

        Not in it: where the run ends this time, intervals, logging, evaluation, parallelism, directories.
        """
        dump = self.model_dump(mode="json")
        model = {key: value for key, value in dump["model"].items() if key not in ("name", "recipe", "num_heads", "head_dim")}
        trainer = {key: dump["trainer"][key] for key in ("steps", "global_batch_size", "grad_clip", "precision")}
        whole = {key: dump[key] for key in ("seed", "init_from", "optim", "schedule")}
        return whole | {"model": model, "data": self.data.identity(), "trainer": trainer}

    def may_change(self) -> set[str]:
        """The dotted keys that a later launch of the same run may set otherwise: all that ``identity`` leaves out."""
        leaves = set(_leaves(self.model_dump(mode="json"))) - set(_leaves(self.identity()))
        return leaves | {f"data.{key}" for key in self.data.operational}

    def run_name(self) -> str:
        """The name of the run's directory under ``output_dir``."""
        if self.name is not None:
            return self.name
        digest = hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.model.name}-{self.data.kind}-{digest}"


def _leaves(node, prefix: str = ""):
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix


def _not_divisible(batch: int, unit: int, what: str) -> str:
    lower, upper = batch // unit * unit, (batch // unit + 1) * unit
    nearest = f"{lower} or {upper}" if lower else str(upper)
    return f"trainer.global_batch_size = {batch} is not divisible by {what} = {unit}; nearest valid: {nearest}"
