# BASE is NGC's PyTorch image (25.06 or later), which brings CUDA, NCCL, Transformer Engine, flash-attn and Apex, built for
# one another:  docker build --build-arg BASE=<NGC PyTorch image> -t megatron_longpo .
ARG BASE
FROM ${BASE}
WORKDIR /workspace/megatron_longpo
COPY setup.py pyproject.toml README.md LICENSE NOTICE ./
COPY megatron_longpo megatron_longpo
COPY tools tools
COPY benchmarks benchmarks
COPY examples examples
# The image's own torch and its companions stay: pip's constraint file there pins them.
RUN pip install --no-cache-dir -e .
ENTRYPOINT ["python", "-m"]
CMD ["megatron_longpo.train", "--help"]
