"""Token mixers.

A new point of the design space is a YAML file; a mixer outside of it is one line in ``AnyMixer``.
"""

from typing import Annotated

from pydantic import Field

from pdn.models.mixers.attention import AttentionConfig
from pdn.models.mixers.base import MixerConfig, TokenMixer
from pdn.models.mixers.comba import CombaConfig
from pdn.models.mixers.delta_product import DeltaProductConfig
from pdn.models.mixers.linear_recurrence import LinearRecurrenceConfig
from pdn.models.mixers.mamba2 import Mamba2Config
from pdn.models.mixers.mesa_net import MesaNetConfig

AnyMixer = Annotated[
    LinearRecurrenceConfig
    | Mamba2Config
    | AttentionConfig
    | CombaConfig
    | DeltaProductConfig
    | MesaNetConfig,
    Field(discriminator="kind"),
]

__all__ = ["AnyMixer", "MixerConfig", "TokenMixer"]
