"""Run on one thread, and the kernels under Triton's interpreter where there is no GPU.

Both are decided when the libraries are first imported. One thread, because tests fork: a child of a
process with OpenMP threads waits for them for ever.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    from tests import interpreter

    interpreter.patch_once_a_launch()
    interpreter.look_up_each_dtype_once()


@pytest.fixture(scope="session")
def s3_server():
    """Start an S3 server on loopback, once; imported here, since few tests need it."""
    from tests.s3 import S3Server

    server = S3Server()
    yield server
    server.close()


@pytest.fixture
def s3(s3_server, monkeypatch):
    """Give a server with an empty bucket, which every AWS client of this process finds."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    s3_server.empty()
    yield s3_server
    s3_server.rules.clear()
