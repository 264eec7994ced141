"""LightningDataModules: batches depend only on the seed, and bad data raises one clear error."""

from lit_tricks.data.cifar import CIFAR10, CIFAR100
from lit_tricks.data.detection.coco import CocoDetection
from lit_tricks.data.detection.voc import VOCDetection
from lit_tricks.data.digits import Digits
from lit_tricks.data.image_folder import ImageFolder
from lit_tricks.data.image_table import ImageTable
from lit_tricks.data.segmentation.ade20k import ADE20KSegmentation
from lit_tricks.data.segmentation.mask_folder import SegmentationFolder
from lit_tricks.data.segmentation.voc import VOCSegmentation
from lit_tricks.data.shards.streaming import Streaming
from lit_tricks.data.synthetic.digit_scenes import DigitDetection, DigitSegmentation

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "ADE20KSegmentation",
    "CocoDetection",
    "DigitDetection",
    "DigitSegmentation",
    "Digits",
    "ImageFolder",
    "ImageTable",
    "SegmentationFolder",
    "Streaming",
    "VOCDetection",
    "VOCSegmentation",
]
