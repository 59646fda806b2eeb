#!/usr/bin/env bash
# LongPO on several machines without a scheduler: start this on each of them, with the same arguments.
#   NODES=2 MASTER_ADDR=node0 examples/torchrun/several_nodes.sh --config examples/longpo_128k.yaml --data-path /data/pairs \
#     --load /ckpt/model --save /shared/runs/longpo
# MASTER_ADDR: one of the machines, where they meet; MASTER_PORT: a free port there; RUN_ID: the same on all machines, another
# for each run that goes on beside it. --save and the data are on a file system that all machines share.
set -euo pipefail

# Ranks that get SIGTERM have this many seconds for their step and a checkpoint (torchrun's own default: 30).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
exec "${PYTHON:-python}" -m torch.distributed.run \
  --nnodes "${NODES:?number of machines}" --nproc-per-node "${PROCESSES_PER_NODE:-gpu}" \
  --rdzv-backend c10d --rdzv-endpoint "${MASTER_ADDR:?one of the machines}:${MASTER_PORT:-29500}" --rdzv-id "${RUN_ID:-longpo}" \
  -m megatron_longpo.train "$@"
