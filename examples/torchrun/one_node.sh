#!/usr/bin/env bash
# LongPO on the GPUs of this machine.
#   examples/torchrun/one_node.sh --config examples/longpo_128k.yaml --data-path /data/pairs --load /ckpt/model --save /runs/longpo
# PROCESSES_PER_NODE: number of processes; by default one per GPU, so it must be set where there is none.
set -euo pipefail

# Ranks that get SIGTERM have this many seconds for their step and a checkpoint (torchrun's own default: 30).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
exec "${PYTHON:-python}" -m torch.distributed.run --standalone --nproc-per-node "${PROCESSES_PER_NODE:-gpu}" \
  -m megatron_longpo.train "$@"
