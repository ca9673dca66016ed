"""qloop: continued pretraining of causal language models on Q (kdb+) code."""

__version__ = "0.1.0"
