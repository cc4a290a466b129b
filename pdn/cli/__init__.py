"""The command line: Hydra composes, pydantic parses, every mistake gets one message.

Nothing else of ``pdn`` knows Hydra.
"""

import sys
from pathlib import Path

# Hydra takes launchers from the namespace package ``hydra_plugins`` only, and finds that by the
# import path.
sys.path.append(str(Path(__file__).parent / "plugins"))
