"""Checkpoints: complete step directories, and what a run goes on from."""
