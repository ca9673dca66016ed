"""Plans the memory, disk and time of a run before it starts."""
