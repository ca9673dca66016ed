"""Several processes: engines, calls that all ranks make together, signals, dead peers."""
