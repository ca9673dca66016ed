"""Held-out loss and completions."""
