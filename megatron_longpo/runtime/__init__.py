"""What everything else stands on: platform, process groups, collectives, failures of ranks, files, locks, progress."""

from megatron_longpo.runtime.quiet import quiet_libraries

# Here, because some libraries read the environment as they are imported, and torch imports tqdm.
quiet_libraries()
