"""Several processes: the launcher's engine, what ranks do together, signals and peers."""
