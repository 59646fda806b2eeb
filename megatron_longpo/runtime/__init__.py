"""Under everything: the platform, process groups, failure of ranks, collectives, files, locks, progress."""
