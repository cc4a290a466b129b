"""The base of every options class, the numbers that they share, and where the YAML files are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_serializer, model_validator

from pdn.wording import counted

Steps = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class Strict(BaseModel):
    """Refuses unknown keys, other types, nan and inf; immutable once parsed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class Every(Strict):
    """Tells an interval, in one unit: steps, seconds or tokens.

    A number is one of steps; else ``{steps: n}``, ``{seconds: s}`` or ``{tokens: n}``.
    """

    steps: Steps | None = None
    seconds: Positive | None = None  # of wall-clock time, counted from the launch
    tokens: Positive | None = None  # trained on, over all ranks

    @model_validator(mode="before")
    @classmethod
    def _steps_if_a_number(cls, value: Any) -> Any:
        return value if isinstance(value, dict | Every) else {"steps": value}

    @model_validator(mode="after")
    def _one_unit(self) -> Self:
        given = [key for key in ("steps", "seconds", "tokens") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(
                f"found {' and '.join(given) or 'no interval'}; expected one of steps, seconds and "
                "tokens"
            )
        return self

    @model_serializer
    def _as_written(self) -> int | dict[str, float]:
        if self.steps is not None:
            return self.steps
        if self.tokens is not None:
            return {"tokens": self.tokens}
        assert self.seconds is not None
        return {"seconds": self.seconds}

    def __str__(self) -> str:
        if self.steps is not None:
            return counted(self.steps, "step")
        return f"{self.seconds:g} s" if self.tokens is None else f"{self.tokens:g} tokens"


def leaves(node: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Yield the dotted path and the value of all that is no dict with keys in nested dicts."""
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, node


def config_root() -> Path:
    """Return the directory of the YAML files: in an installed package, else beside it."""
    package = Path(__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"
