"""The former place of ``Detector``, which checkpoints and configurations name."""

from lit_tricks.tasks.detection import Detector

__all__ = ["Detector"]
