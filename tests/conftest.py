"""Run the kernels under Triton's interpreter where there is no GPU.

That is decided when Triton code is first imported.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
