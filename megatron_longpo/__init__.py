"""LongPO training on Megatron-Core.

Importing the package resolves the platform first: where CUDA is absent, ``runtime.platform`` must make
megatron-core runnable on the CPU before any module of megatron-core is imported.
"""

from megatron_longpo.runtime import platform as platform

__version__ = "0.2.0"
