"""The mathematics of the tricks: pure functions, for training loops without callbacks.

Random draws are arguments, so that every function returns the same for the same arguments.

| Trick | Functions |
|---|---|
| BinaryCrossEntropy | ``multi_hot``, ``prior_logit`` |
| ClassBalanced | ``class_balanced_weights`` |
| CutMix | ``cutmix_box``, ``cutmix``, ``kept_area`` |
| DropPath | ``drop_path_rates``, ``drop_path`` |
| EMA | ``ema_decay``, ``ema_decay_of_half_life``, ``power_ema_decay``, ``power_ema_exponent``, ``power_ema_mixture`` |
| FocalLoss | ``focal_factor`` |
| GeneralizedCrossEntropy | ``box_cox`` |
| KnowledgeDistillation | ``distillation_divergence``, ``dist_divergence`` |
| L1Penalty | ``add_l1_gradient``, ``sparsity`` |
| LabelSmoothing | ``label_smoothing_for_torch`` |
| LayerDecay | ``layer_decay_factor`` |
| LinearScaling | ``lr_scaling_factor`` |
| LogitAdjustment | ``logit_adjustment`` |
| Lookahead | ``lookahead_alpha`` |
| MixUp | ``mixup`` |
| MixUp, CutMix, DropPath, LabelSmoothing | ``strength_at`` |
| Muon | ``orthogonalize``, ``muon_lr_scale`` |
| ProgressiveResizing | ``progressive_side`` |
| SWA | ``swa_lr_share``, ``swa_ends_cycle`` |
| TemperatureScaling | ``fit_temperature``, ``fit_vector_scaling``, ``calibration_scores`` |
| TestTimeAugment | ``tta_views``, ``mean_logits`` |
| WarmupCosine, WarmupExponential, WarmupStep | ``warmup``, ``warmup_cosine``, ``warmup_exponential``, ``warmup_step`` |
| WarmupLinear, WarmupPoly, WarmupStableDecay | ``warmup_linear``, ``warmup_poly``, ``warmup_stable_decay`` |
| WhitenedStem | ``whitening_filters`` |
| XavierInit | ``xavier_uniform`` |
"""

from lit_tricks.callbacks.averaging.power_law import power_ema_decay, power_ema_exponent, power_ema_mixture
from lit_tricks.callbacks.binary_cross_entropy import multi_hot, prior_logit
from lit_tricks.callbacks.calibration.scaling import calibration_scores, fit_temperature, fit_vector_scaling
from lit_tricks.callbacks.class_balanced import class_balanced_weights
from lit_tricks.callbacks.cutmix import cutmix, cutmix_box, kept_area
from lit_tricks.callbacks.drop_path import drop_path, drop_path_rates
from lit_tricks.callbacks.ema import ema_decay, ema_decay_of_half_life
from lit_tricks.callbacks.focal_loss import focal_factor
from lit_tricks.callbacks.generalized_cross_entropy import box_cox
from lit_tricks.callbacks.knowledge_distillation import dist_divergence, distillation_divergence
from lit_tricks.callbacks.l1_penalty import add_l1_gradient, sparsity
from lit_tricks.callbacks.label_smoothing import label_smoothing_for_torch
from lit_tricks.callbacks.layer_decay import layer_decay_factor
from lit_tricks.callbacks.linear_scaling import lr_scaling_factor
from lit_tricks.callbacks.logit_adjustment import logit_adjustment
from lit_tricks.callbacks.lookahead import lookahead_alpha
from lit_tricks.callbacks.mixup import mixup
from lit_tricks.callbacks.muon import muon_lr_scale, orthogonalize
from lit_tricks.callbacks.optim.schedule import warmup
from lit_tricks.callbacks.progressive_resizing import progressive_side
from lit_tricks.callbacks.swa import swa_ends_cycle, swa_lr_share
from lit_tricks.callbacks.test_time_augment import mean_logits, tta_views
from lit_tricks.callbacks.warmup_cosine import warmup_cosine
from lit_tricks.callbacks.warmup_exponential import warmup_exponential
from lit_tricks.callbacks.warmup_linear import warmup_linear
from lit_tricks.callbacks.warmup_poly import warmup_poly
from lit_tricks.callbacks.warmup_stable_decay import warmup_stable_decay
from lit_tricks.callbacks.warmup_step import warmup_step
from lit_tricks.callbacks.whitened_stem import whitening_filters
from lit_tricks.callbacks.xavier_init import xavier_uniform
from lit_tricks.utils.strength import strength_at

__all__ = [
    "add_l1_gradient",
    "box_cox",
    "calibration_scores",
    "class_balanced_weights",
    "cutmix",
    "cutmix_box",
    "dist_divergence",
    "distillation_divergence",
    "drop_path",
    "drop_path_rates",
    "ema_decay",
    "ema_decay_of_half_life",
    "fit_temperature",
    "fit_vector_scaling",
    "focal_factor",
    "kept_area",
    "label_smoothing_for_torch",
    "layer_decay_factor",
    "logit_adjustment",
    "lookahead_alpha",
    "lr_scaling_factor",
    "mean_logits",
    "mixup",
    "multi_hot",
    "muon_lr_scale",
    "orthogonalize",
    "power_ema_decay",
    "power_ema_exponent",
    "power_ema_mixture",
    "prior_logit",
    "progressive_side",
    "sparsity",
    "strength_at",
    "swa_ends_cycle",
    "swa_lr_share",
    "tta_views",
    "warmup",
    "warmup_cosine",
    "warmup_exponential",
    "warmup_linear",
    "warmup_poly",
    "warmup_stable_decay",
    "warmup_step",
    "whitening_filters",
    "xavier_uniform",
]
