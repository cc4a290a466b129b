# CUDA image for training; docs/docker.md has the commands that build and run it.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS build
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates python3 python3-venv python3-dev git \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /pdn
# The dependencies alone, so that a change of the code does not install them again.
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY pdn/__init__.py pdn/__init__.py
RUN mkdir -p configs data/corpora && python3 -m venv /opt/venv \
    && /opt/venv/bin/python -m pip install --no-cache-dir --constraint constraints.txt '.[fla,evals,plots,s3,search,tensorboard]' \
    && /opt/venv/bin/python -m pip uninstall -y pdn

# Triton and torch.compile build at run time: they need a C compiler and ptxas, not the rest of the
# toolkit. NCCL needs the verbs libraries to find InfiniBand.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04
RUN apt-get update && apt-get install -y --no-install-recommends \
        ca-certificates python3 python3-dev gcc g++ cuda-nvcc-13-0 git libibverbs1 ibverbs-providers librdmacm1 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/venv /opt/venv
COPY . /pdn
WORKDIR /pdn
# Any user may run it, so that what it writes belongs to whoever started it: --user $(id -u):$(id -g).
# Such a user has no name and no home of their own: the cache and /tmp are all that is written
# besides the run.
RUN mkdir -p /cache /pdn/runs && chmod 1777 /cache /pdn/runs && chmod -R a+rX /pdn \
    && /opt/venv/bin/python -m compileall -q /pdn/pdn
# The image has no .git: what a run records as its commit.
ARG COMMIT=
USER 10001:10001
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/pdn PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    TRITON_PTXAS_PATH=/usr/local/cuda/bin/ptxas \
    HOME=/cache USER=pdn LOGNAME=pdn PDN_CACHE=/cache/pdn HF_HOME=/cache/huggingface \
    TRITON_CACHE_DIR=/cache/triton TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    MPLCONFIGDIR=/cache/matplotlib NLTK_DATA=/cache/nltk WANDB_CACHE_DIR=/cache/wandb \
    WANDB_CONFIG_DIR=/cache/wandb PDN_COMMIT=$COMMIT
CMD ["python", "train.py", "--help"]
