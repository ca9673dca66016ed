"""Checkpoints: saving, verifying, resuming, listing and exporting."""
