"""LongPO training on Megatron-Core.

Importing the package imports nothing else, so that command lines can be read quickly. Where CUDA is absent, megatron-core
can be imported only after ``runtime.platform`` has prepared it for the CPU; each subpackage that imports megatron-core
therefore imports ``runtime.platform`` first.
"""

__version__ = "0.2.0"
