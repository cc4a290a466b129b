"""Tests of our own, which need no download.

Each is a small config with ``run(subject) -> {metric: value}``. A metric named ``name@x`` is a
point of a curve over x.
"""

from typing import Annotated

from pydantic import Field

from pdn.evals.probes.continuations import ContinuationsProbe
from pdn.evals.probes.length import LengthProbe
from pdn.evals.probes.mqar import MqarProbe
from pdn.evals.probes.needle import NeedleProbe
from pdn.evals.probes.positions import PositionsProbe
from pdn.evals.probes.state_tracking import StateTrackingProbe

AnyProbe = Annotated[
    NeedleProbe
    | LengthProbe
    | PositionsProbe
    | MqarProbe
    | StateTrackingProbe
    | ContinuationsProbe,
    Field(discriminator="kind"),
]

__all__ = ["AnyProbe"]
