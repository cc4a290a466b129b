"""What a run will be, known before it starts: its vocabulary, and a dry run's answer."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pdn.distributed.fsdp import World
from pdn.errors import ConfigError
from pdn.logging.progress import engineering, passing_line
from pdn.models.language_model import LanguageModel
from pdn.optim.optimizers import build_optimizer
from pdn.store.local import format_bytes
from pdn.training.config import RunConfig
from pdn.training.phases import Course


def with_vocabulary(config: RunConfig, data) -> RunConfig:
    """Return the configuration with ``model.vocab_size`` settled.

    Raises:
        ConfigError: the model's vocabulary is smaller than the data's.
    """
    given = config.model.vocab_size
    if given is not None and given < data.vocab_size:
        raise ConfigError(
            "VOCAB",
            f"model.vocab_size = {given}: the data's tokenizer {data.tokenizer_path} has "
            f"{data.vocab_size} entries; "
            f"expected null or at least {data.vocab_size}",
        )
    model = config.model.model_copy(update={"vocab_size": given or data.vocab_size})
    return config.model_copy(update={"model": model})


def describe(config: RunConfig, world: World, open_data: Callable) -> None:
    """Print what the run would be: parameters, memory, tokens, and where everything is written.

    Builds on the meta device.

    Args:
        config: of the run; its vocabulary may be left to the data.
        world: this process among its peers.
        open_data: opens the data, where they tell the vocabulary.
    """
    t, course = config.trainer, Course(config)
    vocabulary = config.model.vocab_size
    if vocabulary is None:
        with passing_line(enabled=True) as progress:
            data = open_data(
                config.data,
                global_batch_size=t.global_batch_size,
                seed=config.data_seed,
                progress=progress,
            )
        config = with_vocabulary(config, data)
        ahead = data.ahead(course.plan(0, t.steps, 0))
        print(
            "data       "
            + ahead.describe(course.samples(0, t.steps))
            .removeprefix("data: ")
            .replace("\n", "\n           ")
        )
        data.close()
    with torch.device("meta"):
        model = LanguageModel(config.model)
    parameters = sum(p.numel() for p in model.parameters())
    shards = config.parallel.dims(world.size).parameter_ranks
    path = config.directory()
    tokens = t.global_batch_size * config.data.seq_len
    gathered = 4 * parameters if shards > 1 and not config.parallel.reshard_after_forward else 0
    optimizer_state = build_optimizer(model, config.optim).state_bytes()
    memory = format_bytes((8 * parameters + optimizer_state) // shards + gathered)
    micro_batches = t.global_batch_size // (t.micro_batch_size * world.batch_ranks)
    print(
        f"model      {config.model.name}: {parameters:,} parameters, {config.model.num_layers} "
        f"layers of {config.model.pattern}"
    )
    print(
        f"compute    {engineering(config.model.flops_per_token(config.data.seq_len))}FLOP a token"
    )
    print(
        f"memory     {memory} a rank for parameters, gradients and optimiser state; activations "
        "come on top"
    )
    print(
        f"batch      {t.global_batch_size} sequences of {config.data.seq_len} tokens = {tokens:,} "
        "tokens a step"
    )
    print(f"           in {micro_batches} micro-batches on each of {world.size} ranks")
    whole = f"{course.tokens(t.steps):,} tokens" if config.branch_from is None else "as a branch"
    print(f"plan       {t.steps:,} steps, {whole}")
    for line in course.lines(t.steps):
        print(f"           {line}")
    print(f"directory  {path.absolute()}")
    print("           config.yaml, status.json, metrics.jsonl, ledger.jsonl,")
    print(f"           checkpoints/step-*/ every {config.checkpoint.every}")
