"""Configs: each a document that says what it is, how long it takes and what to expect."""

from typing import NamedTuple


class Claim(NamedTuple):
    """What was reported of one idea, beside the config that takes it away.

    Errors are those without the idea minus those with it, in points: positive where it helped. None
    where there are words only. Each is one run with one seed; ten views averaged.
    """

    row: str  # how a table calls the ablation
    source: str  # a section of the paper, runs of the 2012 program, a tutorial
    data: str  # what the errors were measured on
    top1: float | None
    top5: float | None
    words: str  # what is said, where it is more or less than the two figures


# The base and one change each, in the order of a table: first those with figures of 2012. The last
# adds something.
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

# The AlexNets of the tutorials, and LeNet; each says in REPORTED what test accuracy it reached
# there on Fashion-MNIST at full size, or None.
VARIANTS = (
    'variant_d2l',
    'variant_gluon',
    'variant_keras',
    'variant_pytorch',
    'variant_tf2',
    'variant_lenet',
)
