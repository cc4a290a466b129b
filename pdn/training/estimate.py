"""What a run takes, told before it starts: the memory of a rank, and hours on so many GPUs.

Memory is counted from the shapes. Speeds are those of docs/training.md, and what was not measured
there is said to be so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from pdn.logging.progress import engineering, peak_of
from pdn.models.config import ModelConfig
from pdn.models.language_model import LanguageModel
from pdn.models.layers import slice_rows
from pdn.models.state import bytes_of_row
from pdn.optim.optimizers import build_optimizer
from pdn.store.local import format_bytes
from pdn.training.config import ATTENTION, RunConfig
from pdn.training.phases import Course
from pdn.wording import counted

GPUS = tuple(2**power for power in range(11))


# ------------------------------------------------------------ memory


@dataclass(frozen=True)
class Memory:
    """Counts a rank's bytes on a GPU where the most is in use: at the end of a forward pass.

    Attributes:
        parameters: this rank's part, float32.
        gradients: of all parameters where micro-batches add them up, else this rank's part, which
            exists when activations have gone.
        optimizer: moments, and an average of the weights.
        gathered: whole parameters of a sharded model.
        activations: of one micro-batch; None if a mixer's were not counted.
        head: slices of the logits, and the gradients of what makes them; None like activations.
    """

    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int | None
    head: int | None
    accumulates: bool

    @property
    def peak(self) -> int | None:
        """Return the sum of what exists at the same time; None without activations."""
        if self.activations is None or self.head is None:
            return None
        kept = self.parameters + self.optimizer + self.gathered + self.head + self.activations
        return kept + (self.gradients if self.accumulates else 0)

    def lines(self) -> Iterator[str]:
        """Describe it."""
        parts = {
            "parameters": self.parameters,
            "gradients": self.gradients,
            "optimiser": self.optimizer,
            "gathered weights": self.gathered,
            "activations": self.activations,
            "logits": self.head,
        }
        peak = "not known" if self.peak is None else format_bytes(self.peak)
        yield f"{peak} a rank, at the end of a forward pass:"
        yield ", ".join(
            f"{name} {'not counted' if size is None else format_bytes(size)}"
            for name, size in parts.items()
            if size != 0
        )
        if not self.accumulates:
            yield "gradients come as activations go, and are not in the sum"


def memory_of(config: RunConfig, world_size: int) -> Memory:
    """Estimate the memory of a rank of ``world_size`` GPUs, with compiled blocks.

    Args:
        config: with the vocabulary settled.
    """
    t, p = config.trainer, config.parallel
    dims = p.dims(world_size)
    with torch.device("meta"):
        model = LanguageModel(config.model)
    count, shards = config.model.num_params(), dims.parameter_ranks
    meshed = world_size > 1 or p.needs_mesh
    width = 4 if t.precision == "fp32" else 2
    micro_batch, passes = _passes(config, world_size)
    tokens, states = _at_once(config, micro_batch, width)
    activations, head = _activations(config, tokens, width), _head(config.model, tokens, width)
    if config.model.implementation != "own":  # whose class keeps others, and whole logits
        activations = head = None
    return Memory(
        parameters=4 * count // shards,
        gradients=4 * count if passes > 1 else 4 * count // shards,
        optimizer=build_optimizer(model, config.optim).state_bytes() // shards,
        gathered=4 * count if meshed and not p.reshard_after_forward else 0,
        activations=None if activations is None else activations + states,
        head=head,
        accumulates=passes > 1,
    )


def _at_once(config: RunConfig, micro_batch: int, width: int) -> tuple[int, int]:
    """Return the tokens whose activations are in memory at once, and the bytes of states of pieces.

    A state is kept for each piece of a sequence, which it starts from: of attention layers the keys
    and values of all tokens before.
    """
    length = config.data.seq_len // config.parallel.context
    size = config.trainer.piece_tokens
    if size is None or size >= length:
        return micro_batch * length, 0
    row = bytes_of_row(config.model, torch.float32 if width == 4 else torch.bfloat16)
    pieces = length // size
    mixers: list[Any] = [config.model.mixers[name] for name in config.model.layers]
    attention = [mixer for mixer in mixers if mixer.kind == ATTENTION]
    of_token = sum(2 * mixer.kv_heads * mixer.head_dim * width for mixer in attention)
    before = pieces * (pieces - 1) // 2 * size
    return micro_batch * size, micro_batch * (pieces * row + before * of_token)


def _passes(config: RunConfig, world_size: int) -> tuple[int, int]:
    """Return the sequences of a micro-batch and the micro-batches of a step, on one rank.

    A share that ``trainer.micro_batch_size`` does not divide is cut into smaller ones.

    Raises:
        ValueError: the batch does not divide into shares.
    """
    t, ranks = config.trainer, config.parallel.dims(world_size).batch_ranks
    if t.global_batch_size % ranks:
        raise ValueError(
            f"trainer.global_batch_size = {t.global_batch_size} does not divide into {ranks} shares"
        )
    share = t.global_batch_size // ranks
    size = next(n for n in range(min(t.micro_batch_size, share), 0, -1) if share % n == 0)
    return size, share // size


def _activations(config: RunConfig, tokens: int, width: int) -> int | None:
    """Return the bytes of all layers, with the weights that they cast to compute in."""
    model, layers = config.model, config.model.num_layers
    of_layer = model.layer_activation_bytes(width)
    if of_layer is None:
        return None
    tables = (1 if model.tie_embeddings else 2) * (model.vocab_size or 0) * model.d_model
    cast = width * (model.num_params() - tables) if width < 4 else 0
    recomputed = {"none": 0, "selective": math.ceil(layers / 2), "full": layers}
    inputs = recomputed[config.parallel.activation_checkpointing]
    whole = layers - inputs + (1 if inputs else 0)  # one is recomputed at a time
    return round(tokens * (whole * of_layer + inputs * width * model.d_model) + cast)


def _head(model: ModelConfig, tokens: int, width: int) -> int:
    """Return the bytes of one slice of logits with its gradient, and of what the head keeps."""
    vocabulary = model.vocab_size or 0
    rows = min(tokens, slice_rows(tokens, vocabulary))
    weights = vocabulary * model.d_model * (4 + width)  # its gradient, the weight
    return 2 * rows * vocabulary * width + weights + 2 * tokens * model.d_model * width


# ------------------------------------------------------------ speed

_SOURCE = "docs/training.md"
# What a layer must be for the measured speeds to be its own; mixers have more keys, at the values
# of the presets.
_GDN: dict[str, object] = {
    "kind": "linear_recurrence", "solve": "online", "decay": "scalar", "gain": "beta",
    "preconditioner": "none", "output_gate": "none", "expand_v": 1.0, "conv_size": 4,
    "head_dim": 128, "num_value_heads": None, "feature_map": "none",
}  # fmt: skip
_MEASURED_MIXERS: dict[str, dict[str, object]] = {
    "pgdn": _GDN | {"preconditioner": "diagonal"},
    "gdn": _GDN,
    "transformer": {
        "kind": "attention", "head_dim": 128, "num_kv_heads": None, "window": None,
        "qk_norm": False, "output_gate": "none",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """Holds a row of docs/training.md: 340M, compiled, 16 x 2048 tokens a GPU, vocabulary 32,000.

    Attributes:
        mixer: of ``_MEASURED_MIXERS``.
        gpu, gpus: what it ran on.
        layout: fsdp, ddp, or none on one GPU.
        tokens_per_second: of all GPUs.
        peak_gib: of one.
    """

    mixer: str
    gpu: str
    gpus: int
    layout: str
    tokens_per_second: int
    peak_gib: float


MEASURED = (
    Measured("pgdn", "H200", 1, "none", 193_912, 44.5),
    Measured("pgdn", "H200", 2, "fsdp", 374_407, 44.1),
    Measured("pgdn", "H200", 2, "ddp", 368_288, 46.5),
    Measured("gdn", "H200", 1, "none", 201_226, 42.4),
    Measured("transformer", "H200", 1, "none", 200_087, 30.2),
    Measured("pgdn", "H100", 1, "none", 172_638, 44.4),
    Measured("pgdn", "H100", 2, "fsdp", 303_914, 44.0),
    Measured("pgdn", "H100", 2, "ddp", 312_839, 46.5),
)
# a token, of those models
FLOPS = {"pgdn": 2_109_431_424, "gdn": 2_107_068_672, "transformer": 2_348_285_952}
# What a pass of a sharded model takes the host, however few tokens it has: PGDN, two GPUs. Of two
# H200 no more is known than that it fits into a step.
HOST_SECONDS_PER_LAYER = {"H100": 0.179 / 24, "H200": 0.175 / 24}
MEASURED_TOKENS = 16 * 2048  # of a pass
# Of twice one GPU, two H200 that share each sequence of 65,536 tokens: PGDN, parallel.context=2.
SHARED_SEQUENCE = {"ddp": 0.921, "fsdp": 0.932}


def mixer_of(model: ModelConfig) -> str | None:
    """Return the measured kind of layer that a model is made of; None if there is none."""
    for name, wanted in _MEASURED_MIXERS.items():
        if all(_fits(model.mixers[used].model_dump(), wanted) for used in set(model.layers)):
            return name
    return None


def _fits(mixer: dict, wanted: dict[str, object]) -> bool:
    return _kinds(mixer, wanted) == wanted


def _kinds(mixer: dict, wanted: dict[str, object]) -> dict[str, object]:
    found = {key: mixer.get(key) for key in wanted}
    return {key: v["kind"] if isinstance(v, dict) else v for key, v in found.items()}


def _unlike(model: ModelConfig) -> str:
    """Name the layers of a model that has no measured ones, with what the nearest has otherwise."""
    names = list(dict.fromkeys(model.layers))
    found = model.mixers[names[0]].model_dump()
    alike = [w for w in _MEASURED_MIXERS.values() if w["kind"] == found["kind"]]
    text = f"layers of {'/'.join(names)}"
    if len(names) > 1 or not alike:
        return text
    others = [
        [f"{key} {has}, not {w[key]}" for key, has in _kinds(found, w).items() if has != w[key]]
        for w in alike
    ]
    return f"{text} ({'; '.join(min(others, key=len))})"


@dataclass(frozen=True)
class Speed:
    """Estimates what a run does on so many GPUs.

    Attributes:
        tokens_per_second: of all; None where nothing was measured that tells it.
        note: what it rests on, or why there is none.
    """

    gpus: int
    tokens_per_second: float | None
    note: str

    def row(self, tokens: float) -> str:
        """Return a line of a table for a run of so many tokens."""
        if self.tokens_per_second is None:
            return f"{self.gpus:>5}  {'-':>8}  {'-':>9}  {'-':>9}  {self.note}"
        hours = tokens / self.tokens_per_second / 3600
        speed = engineering(self.tokens_per_second)
        return (
            f"{self.gpus:>5}  {speed:>8}  {hours:>9,.1f}  {hours * self.gpus:>9,.0f}  {self.note}"
        )


def speed_of(config: RunConfig, gpu: str, gpus: int) -> Speed:
    """Tell the tokens a second of a run from what was measured of a 340M model of its layers.

    The utilisation of one GPU is that model's. Two GPUs of each kind were measured for PGDN; the
    share of two times one that they reach is kept for more, and for other layers. A pass takes no
    less than the host needs to launch it. Of a sequence in pieces, all but the last are computed
    forward once more, a third of a pass each.

    Args:
        config: with the vocabulary settled.
        gpu: a name in ``MEASURED``.
        gpus: how many.
    """
    problem = _unmeasured(config, gpu)
    if problem is not None:
        return Speed(gpus, None, f"not measured: {problem}")
    try:
        micro_batch, _ = _passes(config, gpus)
    except ValueError as error:
        return Speed(gpus, None, str(error))
    mixer, seq_len = mixer_of(config.model), config.data.seq_len
    row = next((m for m in MEASURED if (m.mixer, m.gpu, m.gpus) == (mixer, gpu, 1)), None)
    if row is None:
        return Speed(gpus, None, f"not measured: {mixer} on one {gpu}")
    of_one = row.tokens_per_second * FLOPS[row.mixer] / config.model.flops_per_token(seq_len)
    notes = [] if _is_measured(config, row) else [f"{_utilisation(row):.1%} MFU, as {mixer}_340m"]
    share, length = 1.0, seq_len // config.parallel.context
    if gpus > 1:
        layout = "ddp" if config.parallel.dims(gpus).parameter_ranks == 1 else "fsdp"
        split = config.parallel.context > 1
        share = SHARED_SEQUENCE[layout] if split else _share_of_two(gpu, layout)
        if (gpus, mixer) != (2, "pgdn"):
            notes.append(f"scaling not measured: that of 2 {gpu}, {layout}, {share:.0%}")
        elif split:
            notes.append(f"{share:.0%} of twice one, as at 1 x 65,536")
    pieces = length * micro_batch // _at_once(config, micro_batch, 2)[0]
    tokens = micro_batch * length // pieces
    if pieces > 1:
        notes.append(f"{pieces - 1} of {pieces} pieces are computed forward twice")
    seconds = tokens / (of_one * share)
    host = HOST_SECONDS_PER_LAYER[gpu] * config.model.num_layers
    if gpus > 1 and host > seconds:
        seconds = host
        notes.append(f"waits for the host, {1e3 * host:.0f} ms a pass")
    elif tokens < MEASURED_TOKENS:
        notes.append(f"{tokens:,} tokens a pass, measured with {MEASURED_TOKENS:,}")
    rate = gpus * tokens / (seconds * (1 + (pieces - 1) / pieces / 3))
    return Speed(gpus, rate, "; ".join(notes) or f"measured ({_SOURCE})")


def _unmeasured(config: RunConfig, gpu: str) -> str | None:
    """Return what of a configuration no measured one on that GPU has; None if nothing."""
    p = config.parallel
    if mixer_of(config.model) is None:
        return _unlike(config.model)
    for found, what in (
        (config.model.implementation != "own", "model.implementation=fla"),
        (p.compile is False, "blocks that are not compiled"),
        (p.activation_checkpointing != "none", "recomputed activations"),
        (p.reshard_after_forward, "parallel.reshard_after_forward"),
        (p.cpu_offload, "parallel.cpu_offload"),
        (p.context > 2, "parallel.context above 2"),
        (p.context > 1 and gpu != "H200", f"parallel.context on {gpu}"),
        (config.trainer.precision == "fp32", "float32"),
        (config.optim.kind != "adamw", f"optim={config.optim.kind}"),
        (bool(config.phases), "phases"),
    ):
        if found:
            return what
    return None


def _is_measured(config: RunConfig, row: Measured) -> bool:
    length = config.data.seq_len
    if config.optim.ema is not None:
        return False
    return length == 2048 and config.model.flops_per_token(length) == FLOPS[row.mixer]


def _utilisation(row: Measured) -> float:
    peak = peak_of(row.gpu)
    assert peak is not None  # of a GPU in the table
    return row.tokens_per_second * FLOPS[row.mixer] / (peak * row.gpus)


def _share_of_two(gpu: str, layout: str) -> float:
    """Return what two GPUs reached, of two times one."""
    one, two = (
        next(m for m in MEASURED if (m.mixer, m.gpu, m.gpus, m.layout) == ("pgdn", gpu, n, kind))
        for n, kind in ((1, "none"), (2, layout))
    )
    return two.tokens_per_second / (2 * one.tokens_per_second)


# ------------------------------------------------------------ all of it


def sized(config: RunConfig, world_size: int, gpu: str) -> list[str]:
    """Describe model, batch and memory of a rank, and the hours on 1 to 1024 GPUs.

    Args:
        config: with the vocabulary settled.
        world_size: ranks that the memory is of.
        gpu: H200 or H100, whose measured speeds count.
    """
    t, model, seq_len = config.trainer, config.model, config.data.seq_len
    per_step = t.global_batch_size * seq_len
    passes = t.global_batch_size // (
        t.micro_batch_size * config.parallel.dims(world_size).batch_ranks
    )
    first, *rest = memory_of(config, world_size).lines()
    return [
        f"model      {model.name}: {model.num_params():,} parameters, "
        f"{counted(model.num_layers, 'layer')} of {model.pattern}",
        f"compute    {engineering(model.flops_per_token(seq_len))}FLOP a token",
        f"memory     {first}",
        *(f"           {line}" for line in rest),
        f"batch      {counted(t.global_batch_size, 'sequence')} of {seq_len} tokens = "
        f"{per_step:,} tokens a step",
        f"           in {counted(passes, 'micro-batch')} on each of {counted(world_size, 'rank')}",
        *_hours(config, gpu),
    ]


def _hours(config: RunConfig, gpu: str) -> list[str]:
    """Return a table of speeds and hours, or the reason why nothing is known of them."""
    rows = [speed_of(config, gpu, gpus) for gpus in GPUS if _layout_fits(config, gpus)]
    known = [row for row in rows if row.tokens_per_second is not None]
    if not known:
        reason = rows[0].note if rows else "no layout of ranks for 1, 2, 4, ... 1024 of them"
        return [f"speed      on {gpu}: {reason}"]
    steps = config.trainer.steps
    tokens = Course(config).tokens(steps)
    head = f"{'GPUs':>5}  {'tokens/s':>8}  {'hours':>9}  {'GPU-hours':>9}"
    return [
        f"speed      on {gpu}, {engineering(tokens)} tokens, by what {_SOURCE} has measured:",
        f"           {head}",
        *(f"           {row.row(tokens)}" for row in rows),
    ]


def _layout_fits(config: RunConfig, gpus: int) -> bool:
    try:
        config.parallel.dims(gpus)
    except ValueError:
        return False
    return True
