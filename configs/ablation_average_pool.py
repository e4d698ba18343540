"""Ablation: average pooling in the place of max-pooling.

    python main.py --config=configs/ablation_average_pool.py

Not in the paper, which takes the maximum without a word (3.4, 3.5). Tutorials claim that it is the
better of the two, without a figure.

In the order of the source, pooling stands before the ReLU in conv1 and conv5: there the maximum
keeps what is positive, and the average mixes it with what is not.
"""

from configs import Claim, alexnet

CLAIM = Claim(
    row='average pooling',
    source='tutorials',
    data='none',
    top1=None,
    top5=None,
    words='the maximum is better',
)


def get_config(scale: str = 'quickstart'):
    """Base, every pooling an average."""
    config = alexnet.get_config(scale)
    config.name = 'ablation_average_pool'
    config.model.pool.kind = 'average'
    return config
