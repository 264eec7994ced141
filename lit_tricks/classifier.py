"""The former place of ``Classifier``, which checkpoints and configurations name."""

from lit_tricks.tasks.classification import Classifier

__all__ = ["Classifier"]
