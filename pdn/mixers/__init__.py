"""Token mixers. A new point of the design space is a YAML file; a mixer outside of it is one line in ``AnyMixer``."""

from typing import Annotated

from pydantic import Field

from pdn.mixers.attention import AttentionConfig
from pdn.mixers.base import MixerConfig, TokenMixer
from pdn.mixers.comba import CombaConfig
from pdn.mixers.delta_product import DeltaProductConfig
from pdn.mixers.linear_recurrence import LinearRecurrenceConfig
from pdn.mixers.mamba2 import Mamba2Config

AnyMixer = Annotated[
    LinearRecurrenceConfig | Mamba2Config | AttentionConfig | CombaConfig | DeltaProductConfig,
    Field(discriminator="kind"),
]

__all__ = ["AnyMixer", "MixerConfig", "TokenMixer"]
