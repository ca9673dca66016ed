"""The disk: system calls, folders that are complete or absent, tensors one at a time."""
