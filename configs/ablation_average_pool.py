"""Ablation: average pooling instead of max-pooling.

    python main.py --config=configs/ablation_average_pool.py

The paper takes the maximum without giving a reason (3.4, 3.5). Tutorials claim that
max-pooling is better, without a figure.

In conv1 and conv5, pooling comes before the ReLU (source). There, max-pooling keeps positive
values, whereas averaging mixes them with negative ones.
"""

from configs import Claim, alexnet

CLAIM = Claim(
    row='average pooling',
    source='tutorials',
    data='none',
    top1=None,
    top5=None,
    words='max-pooling is better',
)


def get_config(scale: str = 'quickstart'):
    """Return the base with average pooling everywhere."""
    config = alexnet.get_config(scale)
    config.name = 'ablation_average_pool'
    config.model.pool.kind = 'average'
    return config
