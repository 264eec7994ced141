"""A Detector so small that a step takes milliseconds, and a Trainer that is quiet."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, Trainer, seed_everything

from lit_tricks import Detector

FEW = {"box_batch_size_per_image": 8, "rpn_post_nms_top_n_train": 16, "rpn_post_nms_top_n_test": 8}
SMALL: dict[str, Any] = {
    "num_classes": 10,
    "backbone_args": {"depth": 18, "width": 0.03125},
    "channels": 8,
    "min_size": 64,
    "max_size": 64,
    "input_size": (1, 64, 64),
}


def detector(model: str = "faster_rcnn", **kwargs: Any) -> Detector:
    seed_everything(0, verbose=False)
    stages: dict[str, Any] = {"head_width": 16, "model_args": FEW, "anchor_scale": 4} if model == "faster_rcnn" else {}
    return Detector(model, **(SMALL | stages | kwargs))


def trainer(*tricks: Callback, **kwargs: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    limits = {"limit_train_batches": 3, "limit_val_batches": 1, "num_sanity_val_steps": 0}
    settings: dict[str, Any] = {"accelerator": "cpu", "max_epochs": 1, "logger": False, "log_every_n_steps": 1}
    return Trainer(callbacks=list(tricks), **(quiet | limits | settings | kwargs))
