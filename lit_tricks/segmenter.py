"""The former place of ``Segmenter``, which checkpoints and configurations name."""

from lit_tricks.tasks.segmentation import Segmenter

__all__ = ["Segmenter"]
