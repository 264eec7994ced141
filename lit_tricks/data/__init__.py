"""LightningDataModules: batches depend on the seed alone, and bad data ends in one clear message."""

from lit_tricks.data.cifar import CIFAR10, CIFAR100
from lit_tricks.data.detection import CocoDetection, DigitDetection, VOCDetection
from lit_tricks.data.digits import Digits
from lit_tricks.data.image_folder import ImageFolder
from lit_tricks.data.segmentation import ADE20KSegmentation, DigitSegmentation, SegmentationFolder, VOCSegmentation
from lit_tricks.data.streaming import Streaming

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "ADE20KSegmentation",
    "CocoDetection",
    "DigitDetection",
    "DigitSegmentation",
    "Digits",
    "ImageFolder",
    "SegmentationFolder",
    "Streaming",
    "VOCDetection",
    "VOCSegmentation",
]
