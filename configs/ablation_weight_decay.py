"""Ablation: no weight decay.

    python main.py --config=configs/ablation_weight_decay.py

The paper: "this small amount of weight decay was important for the model to learn. In other words,
weight decay here is not merely a regularizer: it reduces the model's training error" (5). It gives
no figure, and no run was found. In a run of a few epochs, a decay of 0.0005 hardly changes the
weights.
"""

from configs import Claim, alexnet

CLAIM = Claim(
    row='no weight decay',
    source='paper 5',
    data='none',
    top1=None,
    top5=None,
    words='training error also rises',
)


def get_config(scale: str = 'quickstart'):
    """Return the base without weight decay."""
    config = alexnet.get_config(scale)
    config.name = 'ablation_weight_decay'
    config.optimizer.weight_decay = 0.0
    return config
