"""Configs: each file documents a recipe, its command and the result to expect."""

from typing import NamedTuple


class Claim(NamedTuple):
    """A published result for one idea, in the config that removes the idea.

    Differences are the errors without the idea minus those with it, in points: positive where it
    helped, None where no figure was published. Each is from a single run with ten views averaged.
    """

    row: str  # the ablation's name in tables
    source: str  # a section of the paper, runs of the 2012 program, a tutorial
    data: str  # the data set that the errors were measured on
    top1: float | None
    top5: float | None
    words: str  # a remark


# The base with one change each, in table order: those with published figures come first. The last
# one adds a layer.
ABLATIONS = (
    'ablation_depth',
    'ablation_one_tower',
    'ablation_lrn',
    'ablation_crosstalk',
    'ablation_colour',
    'ablation_overlap',
    'ablation_dropout',
    'ablation_augmentation',
    'ablation_weight_decay',
    'ablation_tanh',
    'ablation_sigmoid',
    'ablation_average_pool',
    'ablation_init',
    'ablation_lrn_paper',
    'ablation_norm_order',
    'ablation_spatial_norm',
    'ablation_crop_chunk',
    'alexnet_conv6',
)

# The AlexNets of tutorials, and LeNet. REPORTED in each is the test accuracy that its tutorial
# reports on Fashion-MNIST at full size, or None.
VARIANTS = (
    'variant_d2l',
    'variant_gluon',
    'variant_keras',
    'variant_pytorch',
    'variant_tf2',
    'variant_lenet',
)
