# CUDA image for training: docker build -t pdn . && docker run --gpus all --ipc host -v $PWD/runs:/pdn/runs pdn \
#   torchrun --nproc-per-node 8 train.py model=pgdn_1b data=slimpajama
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS build
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-venv python3-dev git && rm -rf /var/lib/apt/lists/*
WORKDIR /pdn
COPY pyproject.toml constraints.txt README.md ./
COPY pdn/__init__.py pdn/__init__.py
RUN python3 -m venv /opt/venv && /opt/venv/bin/python -m pip install --no-cache-dir --constraint constraints.txt '.[fla,evals,plots]' \
    && /opt/venv/bin/python -m pip uninstall -y pdn

# Triton and torch.compile build at run time: they need a C compiler and ptxas, not the rest of the toolkit.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-dev gcc g++ cuda-nvcc-13-0 \
    && rm -rf /var/lib/apt/lists/* && useradd --create-home --uid 10001 pdn && mkdir -p /pdn/runs && chown -R pdn /pdn
COPY --from=build /opt/venv /opt/venv
COPY --chown=pdn . /pdn
WORKDIR /pdn
USER pdn
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/pdn PYTHONUNBUFFERED=1 TRITON_PTXAS_PATH=/usr/local/cuda/bin/ptxas
CMD ["python", "train.py", "--help"]
