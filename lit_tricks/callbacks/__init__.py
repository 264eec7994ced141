"""The tricks. ``__all__`` is their registry: tests, README and command line go by it."""

from lit_tricks.callbacks.binary_cross_entropy import BinaryCrossEntropy
from lit_tricks.callbacks.channels_last import ChannelsLast
from lit_tricks.callbacks.class_balanced import ClassBalanced
from lit_tricks.callbacks.compile import Compile
from lit_tricks.callbacks.cutmix import CutMix
from lit_tricks.callbacks.drop_path import DropPath
from lit_tricks.callbacks.ema import EMA
from lit_tricks.callbacks.fixres import FixRes
from lit_tricks.callbacks.focal_loss import FocalLoss
from lit_tricks.callbacks.freeze import Freeze
from lit_tricks.callbacks.generalized_cross_entropy import GeneralizedCrossEntropy
from lit_tricks.callbacks.knowledge_distillation import KnowledgeDistillation
from lit_tricks.callbacks.l1_penalty import L1Penalty
from lit_tricks.callbacks.label_smoothing import LabelSmoothing
from lit_tricks.callbacks.layer_decay import LayerDecay
from lit_tricks.callbacks.linear_scaling import LinearScaling
from lit_tricks.callbacks.logit_adjustment import LogitAdjustment
from lit_tricks.callbacks.lookahead import Lookahead
from lit_tricks.callbacks.mixup import MixUp
from lit_tricks.callbacks.muon import Muon
from lit_tricks.callbacks.no_bias_decay import NoBiasDecay
from lit_tricks.callbacks.precise_bn import PreciseBN
from lit_tricks.callbacks.progressive_resizing import ProgressiveResizing
from lit_tricks.callbacks.schedule_free import ScheduleFree
from lit_tricks.callbacks.swa import SWA
from lit_tricks.callbacks.temperature_scaling import TemperatureScaling
from lit_tricks.callbacks.test_time_augment import TestTimeAugment
from lit_tricks.callbacks.unfreeze import Unfreeze
from lit_tricks.callbacks.warmup_cosine import WarmupCosine
from lit_tricks.callbacks.warmup_exponential import WarmupExponential
from lit_tricks.callbacks.warmup_linear import WarmupLinear
from lit_tricks.callbacks.warmup_poly import WarmupPoly
from lit_tricks.callbacks.warmup_stable_decay import WarmupStableDecay
from lit_tricks.callbacks.warmup_step import WarmupStep
from lit_tricks.callbacks.whitened_stem import WhitenedStem
from lit_tricks.callbacks.xavier_init import XavierInit
from lit_tricks.callbacks.zero_gamma import ZeroGamma

__all__ = [
    "EMA",
    "SWA",
    "BinaryCrossEntropy",
    "ChannelsLast",
    "ClassBalanced",
    "Compile",
    "CutMix",
    "DropPath",
    "FixRes",
    "FocalLoss",
    "Freeze",
    "GeneralizedCrossEntropy",
    "KnowledgeDistillation",
    "L1Penalty",
    "LabelSmoothing",
    "LayerDecay",
    "LinearScaling",
    "LogitAdjustment",
    "Lookahead",
    "MixUp",
    "Muon",
    "NoBiasDecay",
    "PreciseBN",
    "ProgressiveResizing",
    "ScheduleFree",
    "TemperatureScaling",
    "TestTimeAugment",
    "Unfreeze",
    "WarmupCosine",
    "WarmupExponential",
    "WarmupLinear",
    "WarmupPoly",
    "WarmupStableDecay",
    "WarmupStep",
    "WhitenedStem",
    "XavierInit",
    "ZeroGamma",
]
