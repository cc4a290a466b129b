"""Which values of the axes go together."""

from __future__ import annotations


def check_preconditioner(config) -> None:
    """Refuse what is unstable or has no meaning.

    The online solve is stable while beta * bound <= 2.
    """
    p, gain = config.preconditioner, config.gain
    if p.kind == "learned" and (config.solve != "online" or gain.kind != "beta"):
        raise ValueError(
            f"preconditioner.kind = learned with solve = {config.solve} and gain.kind = "
            f"{gain.kind}: expected online and beta"
        )
    if p.kind != "none" and gain.kind in ("efla", "nlms"):
        raise ValueError(
            f"gain.kind = {gain.kind} together with a preconditioner: expected beta or longhorn"
        )
    if p.kind != "none" and gain.kind == "beta" and config.solve == "online":
        _check_range(p, gain.range)
    if p.kind != "diagonal":
        return
    if gain.kind == "longhorn":
        if p.factor != "none" or p.form == "sherman_morrison" or p.tied:
            raise ValueError(
                "gain.kind = longhorn has a factor of its own; expected preconditioner.form = "
                "squash or inverse, factor = none and tied = false"
            )
    elif config.solve == "online":
        if p.form == "inverse":
            raise ValueError(
                "preconditioner.form = inverse is unbounded, for solve = offline only; expected "
                "form = squash"
            )
    elif p.form == "sherman_morrison" or p.factor != "none":
        raise ValueError(
            f"preconditioner.form = {p.form}, factor = {p.factor}: they scale a write key, for "
            "solve = online only; expected form = squash or inverse and factor = none"
        )
    _check_gates(config)


def _check_range(p, range_: float) -> None:
    """Refuse a gain whose product with the largest factor of a write key exceeds 2."""
    bounded = p.kind == "diagonal" and p.form == "squash" and p.factor == "none"
    most = 2 / p.bound if bounded else 1.0
    if range_ > most:
        raise ValueError(
            f"gain.range = {range_} together with a preconditioner: the recurrence is then no "
            f"longer stable; expected gain.range <= {most:.4g}"
            f"{' = 2 / bound' if bounded else ''} or preconditioner.kind = none"
        )


def _check_gates(config) -> None:
    """Check the main recurrence's gates that the preconditioner reads."""
    p = config.preconditioner
    if p.factor == "share" and config.decay.kind not in ("none", "scalar"):
        raise ValueError(
            f"preconditioner.factor = share with decay.kind = {config.decay.kind}: expected none "
            "or scalar"
        )
    if p.tied and (config.decay.kind != "scalar" or config.gain.kind != "beta"):
        raise ValueError(
            f"preconditioner.tied with decay.kind = {config.decay.kind} and gain.kind = "
            f"{config.gain.kind}: expected scalar and beta"
        )
    if p.tied and p.num_heads(config.heads) != config.heads.values:
        raise ValueError(
            "preconditioner.tied with grouped value heads: their gates are one each; expected "
            "per_head_of = values"
        )
