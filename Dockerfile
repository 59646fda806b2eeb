# Training on GPUs: NGC's PyTorch image, which brings CUDA, NCCL and torch built for one another, and this project on top.
#   docker build -t megatron_longpo .
#   docker run --gpus all --shm-size 32g -v /data:/data megatron_longpo train --config examples/longpo_128k.yaml ...
ARG BASE=nvcr.io/nvidia/pytorch:25.06-py3
FROM ${BASE}

LABEL org.opencontainers.image.title="megatron_longpo" \
      org.opencontainers.image.description="Short-to-long preference optimization (LongPO) on Megatron-Core" \
      org.opencontainers.image.licenses="Apache-2.0"

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /workspace/megatron_longpo
COPY setup.py pyproject.toml README.md LICENSE NOTICE ./
COPY megatron_longpo megatron_longpo
# The base pins its own packages in the file that PIP_CONSTRAINT names, torch and its companions among them. It stays in force
# here; the build fails if pip replaced torch nevertheless.
RUN version() { python -c 'import importlib.metadata as m; print(m.version("torch"))'; } \
 && before=$(version) \
 && pip install --no-cache-dir -c "${PIP_CONSTRAINT:-/dev/null}" '.[s3]' \
 && after=$(version) \
 && if [[ $before != "$after" ]]; then echo "torch $before of the base became $after" >&2; exit 1; fi
COPY tools tools
COPY benchmarks benchmarks
COPY examples examples

# Not 1000, which Ubuntu's images give to a user of their own.
ARG USER_ID=10001
RUN useradd --create-home --uid "${USER_ID}" longpo
USER ${USER_ID}

HEALTHCHECK --interval=5m --timeout=30s CMD ["megatron-longpo", "--help"]
ENTRYPOINT ["megatron-longpo"]
CMD ["--help"]
