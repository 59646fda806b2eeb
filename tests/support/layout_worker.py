"""Load checkpoints at every layout of this world size and save them unchanged.

torchrun ... -m tests.support.layout_worker FOLDER FAMILIES
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from megatron_longpo.config import from_dict
from megatron_longpo.runtime import process_groups
from megatron_longpo.runtime.failure import run_or_fail
from megatron_longpo.runtime.process_groups import destroy_groups
from megatron_longpo.training.plan import make_plan
from megatron_longpo.training.session import open_session
from megatron_longpo.training.trainer import start_training

LAYOUTS = {
    1: {"tp1": {}},
    2: {
        "tp2-sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        "pp2-vpp2": {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1},
        "pp2-last1": {"pipeline_model_parallel_size": 2, "decoder_last_pipeline_num_layers": 1},
        "cp2-distopt": {"context_parallel_size": 2, "use_distributed_optimizer": True},
    },
    4: {"tp2-pp2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}},
}


def main() -> None:
    folder, families = Path(sys.argv[1]), sys.argv[2].split(",")
    process_groups.start_processes(5)
    for family in families:
        for name, layout in LAYOUTS[int(os.environ["WORLD_SIZE"])].items():
            config = from_dict(
                {
                    "data": {"data_path": str(folder / "data")},
                    "parallel": layout,
                    "objective": {"objective": "sft"},
                    "checkpoint": {
                        "load": str(folder / f"{family}.ckpt"),
                        "save": str(folder / "saved" / f"{family}@{name}"),
                        "no_save_optim": True,
                    },
                    "training": {"global_batch_size": 4},
                    "model": {"max_position_embeddings": 512},
                },
                name,
            )
            session = open_session(make_plan(config, int(os.environ["WORLD_SIZE"])))
            start_training(session, began=time.monotonic()).save(last=True)
            destroy_groups()
    process_groups.stop_processes()


if __name__ == "__main__":
    run_or_fail(main)
