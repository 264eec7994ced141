"""The LightningModules, one a task. They bring timm, so that their modules are imported when they are asked for."""

__all__ = ["TASKS"]

TASKS = {  # class name: module
    "Classifier": "lit_tricks.tasks.classification",
    "Detector": "lit_tricks.tasks.detection",
    "Segmenter": "lit_tricks.tasks.segmentation",
}
