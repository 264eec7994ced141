"""A small Segmenter, its images and masks, and its configuration."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from lit_tricks import Segmenter

TINY_YAML = """
trainer:
  max_epochs: 2
  accelerator: cpu
  limit_train_batches: 3
  limit_val_batches: 1
  limit_test_batches: 1
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
model:
  class_path: Segmenter
  init_args:
    model_args: {depth: 18, width: 0.03125, small_input: true}
    aux_weight: 0.4
data:
  class_path: DigitSegmentation
  init_args: {batch_size: 4}
"""
FIT = ("fit", "--config", "small.yaml")

K, IGNORED = 5, 255
TINY: dict[str, Any] = {"depth": 18, "width": 0.0625, "small_input": True}


def segmenter(**args: Any) -> Segmenter:
    torch.manual_seed(0)
    return Segmenter(**({"num_classes": K, "model_args": TINY, "input_size": (1, 16, 16)} | args))


def trainer(**args: Any) -> Trainer:
    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "max_epochs": 1}
    quiet |= {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return Trainer(**(quiet | {"log_every_n_steps": 1} | args))


def pairs(count: int, seed: int = 0, classes: int = K, side: int = 16, ignored: float = 0.2) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 1, side, side, generator=generator)
    masks = torch.randint(classes, (count, side, side), generator=generator)
    masks[torch.rand(masks.shape, generator=generator) < ignored] = IGNORED
    return list(zip(images, masks, strict=True))


def loader(samples: list[Any], batch_size: int = 2) -> DataLoader[Any]:
    return DataLoader(samples, batch_size=batch_size)
