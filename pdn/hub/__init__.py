"""Models as Hugging Face folders: out with ``export``, back with ``import_weights``.

Importing is for continued pretraining. Importing this package imports neither transformers nor
flash-linear-attention.
"""

from pdn.hub.load import load_released
from pdn.hub.released import model_config_of
from pdn.hub.weights import import_weights, is_exported
from pdn.hub.writer import export

__all__ = ["export", "import_weights", "is_exported", "load_released", "model_config_of"]
