"""The tricks. ``__all__`` is their registry: tests, README and command line go by it."""

from lit_tricks.callbacks.warmup_cosine import WarmupCosine
from lit_tricks.callbacks.warmup_exponential import WarmupExponential
from lit_tricks.callbacks.warmup_step import WarmupStep

__all__ = ["WarmupCosine", "WarmupExponential", "WarmupStep"]
