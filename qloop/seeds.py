"""Random numbers that follow from (seed, step, micro-batch) alone: any step can be drawn again."""

import hashlib
import os
import random

import numpy as np
import torch


def seed_at(seed: int, step: int, micro_batch: int) -> int:
    """Gives the seed of one forward pass.

    Args:
        seed: The run's.
        step: Updates made so far.
        micro_batch: Number of the micro-batch in the step, over all ranks: two ranks never share
            one.
    """
    digest = hashlib.sha256(f"{seed} {step} {micro_batch}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # torch takes 63 bits


def seed_forward_pass(seed: int) -> None:
    """Seeds torch, and Python and numpy too, from which a model's own code may draw."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # numpy takes 32 bits


def use_deterministic_kernels() -> None:
    """Makes torch refuse kernels whose result varies from call to call."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
