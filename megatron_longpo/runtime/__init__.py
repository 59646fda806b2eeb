"""What everything else stands on: platform, process groups, collectives, failures of ranks, files, locks, progress."""
