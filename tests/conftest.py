"""Tests may import megatron-core before the package: the platform prepares it first."""

import os

# isort: off
from tests.support import gpus  # before the platform, whose functions of torch.cuda it would ask

gpus.stay_on_the_cpu()
import megatron_longpo.runtime.platform  # noqa: E402, F401

# isort: on

# What a doctor found on this machine is no matter of the tests.
os.environ.setdefault("MEGATRON_LONGPO_DOCTOR_RECORD", "ignore")
