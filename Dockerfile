# A trainer on NVIDIA's image, which holds torch, Transformer Engine and apex for its CUDA.
# NEVER BUILT: this project has had no machine with a GPU and docker. See docs/gpu.md.
ARG BASE=nvcr.io/nvidia/pytorch:26.02-py3
FROM ${BASE}

WORKDIR /opt/megatron-rl
COPY pyproject.toml README.md LICENSE ./
COPY megatron_rl ./megatron_rl
COPY configs ./configs

# torch, triton, Transformer Engine and apex are those of the image. Its constraints file keeps them.
RUN pip install --no-cache-dir .

# SGLang has an environment of its own, whose NCCL must equal the trainer's for rollout.transport: distributed.
COPY requirements ./requirements
RUN python -m venv /opt/sglang && /opt/sglang/bin/pip install --no-cache-dir --no-deps -r requirements/sglang-gpu.txt
ENV SGLANG_PYTHON=/opt/sglang/bin/python

ENTRYPOINT ["megatron-rl"]
CMD ["doctor"]
