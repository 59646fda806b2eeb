#!/usr/bin/env bash
# LongPO on two to four machines: it begins when two are there, and goes on from its newest checkpoint when one leaves or comes.
#   MASTER_ADDR=node0 examples/torchrun/elastic.sh --config examples/longpo_128k.yaml --data-path /data/pairs \
#     --load /ckpt/model --save /shared/runs/longpo --save-interval 20
# NODES: fewest and most machines (MIN:MAX). What changes with their number is the data-parallel size; the global batch stays,
# and so do the samples of each step. The machine MASTER_ADDR holds the rendezvous and must stay.
set -euo pipefail

# Ranks that get SIGTERM have this many seconds for their step and a checkpoint (torchrun's own default: 30).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
# Without this, torchrun 2.13 cannot take in a machine that comes later (docs/operations.md).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}
exec "${PYTHON:-python}" -m torch.distributed.run \
  --nnodes "${NODES:-2:4}" --nproc-per-node "${PROCESSES_PER_NODE:-gpu}" --max-restarts "${MAX_RESTARTS:-100}" \
  --rdzv-backend c10d --rdzv-endpoint "${MASTER_ADDR:?one of the machines}:${MASTER_PORT:-29500}" --rdzv-id "${RUN_ID:-longpo}" \
  -m megatron_longpo.train "$@"
