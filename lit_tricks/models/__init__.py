"""Models: ResNet of Bag of Tricks in the variants A to D, a small VGG, every model of timm, and weights for them."""

from lit_tricks.models.backbone import Backbone
from lit_tricks.models.factory import create_model
from lit_tricks.models.resnet import resnet
from lit_tricks.models.separable import make_separable
from lit_tricks.models.small_vgg import small_vgg
from lit_tricks.models.spp import SpatialPyramidPool2d
from lit_tricks.models.transfer import freeze, layer_scales
from lit_tricks.models.weights import load_weights
from lit_tricks.utils.logit_scaling import LogitScaling

__all__ = [
    "Backbone",
    "LogitScaling",
    "SpatialPyramidPool2d",
    "create_model",
    "freeze",
    "layer_scales",
    "load_weights",
    "make_separable",
    "resnet",
    "small_vgg",
]
