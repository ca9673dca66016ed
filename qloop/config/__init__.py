"""The config: its keys, and how a file and flags become one."""
