"""What a run will be, known before it starts: its vocabulary, and a dry run's answer."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pdn.distributed.fsdp import World
from pdn.errors import ConfigError, DataError
from pdn.logging.progress import passing_line, peak_of
from pdn.training.carry import describe_carried
from pdn.training.config import RunConfig
from pdn.training.estimate import sized
from pdn.training.names import directory_of
from pdn.training.phases import Course
from pdn.training.setup import uses_bf16
from pdn.wording import counted


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
            f"{data.vocab_size} entries; expected null or at least {data.vocab_size}",
        )
    model = config.model.model_copy(update={"vocab_size": given or data.vocab_size})
    return config.model_copy(update={"model": model})


def describe(config: RunConfig, world: World, open_data: Callable) -> None:
    """Print what the run would be: size, memory, hours, tokens, and where everything is written.

    Nothing is built on a device.

    Args:
        config: of the run; its vocabulary may be left to the data.
        world: this process among its peers.
        open_data: opens the data, where they tell the vocabulary.
    """
    t, course = config.trainer, Course(config)
    vocabulary, refused = config.model.vocab_size, None
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
        try:
            ahead.check_epochs(course.samples(0, t.steps))
        except DataError as error:
            refused = f"refused    {error.args[0]}"
        data.close()
    print("\n".join(sized(config, world.size, _gpu(world.device))))
    whole = f"{course.tokens(t.steps):,} tokens" if config.branch_from is None else "as a branch"
    print(f"plan       {counted(t.steps, 'step')}, {whole}")
    for line in course.lines(t.steps):
        print(f"           {line}")
    carried = describe_carried(config, world, uses_bf16(config, world))
    if carried is not None:
        print(f"carried    {carried}")
    print(f"directory  {directory_of(config).absolute()}")
    print("           config.yaml, status.json, metrics.jsonl, ledger.jsonl,")
    print(f"           checkpoints/step-*/ every {config.checkpoint.every}")
    if refused is not None:
        print(refused)


def _gpu(device: torch.device) -> str:
    """Return the GPU whose measured speeds are told: this one, or H200 where it has none."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return "H100" if "H100" in name and peak_of(name) == peak_of("H100") else "H200"
