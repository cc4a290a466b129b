"""The environment of processes that tests start."""

import os
from pathlib import Path

# This checkout before what the tests themselves were given: the packages may be there and nowhere
# else.
PYTHON_PATH = os.pathsep.join(
    filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])
)
