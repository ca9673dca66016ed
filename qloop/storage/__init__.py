"""The disk: system calls, folders that are whole or absent, tensors piece by piece."""
