"""The LightningModules, one per task. They import timm, so each module is imported at its first use."""

__all__ = ["TASKS"]

TASKS = {  # class name: module
    "Classifier": "lit_tricks.tasks.classification",
    "Detector": "lit_tricks.tasks.detection",
    "Segmenter": "lit_tricks.tasks.segmentation",
}
