"""Ablation: tanh instead of ReLU.

    python main.py --config=configs/ablation_tanh.py

The paper: a four-layer net on CIFAR-10, without regularisation and with rates chosen for each,
reaches 25 % training error six times sooner with ReLU (3.1, figure 1). It gives no error for the
full net.

The biases of 1 are part of the change: they provide "the ReLUs with positive inputs" (5), and would
push a tanh into saturation (at quickstart the logits then vary by 5e-4 across images, a collapsed
initialisation; by 1e-2 with biases of 0). Init and rates are still those chosen for ReLU. The
paper's comparison, with rates chosen for each, is `python -m experiments.figure1`.
"""

from configs import Claim, alexnet

CLAIM = Claim(
    row='tanh instead of ReLU',
    source='paper 3.1, figure 1',
    data='CIFAR-10',
    top1=None,
    top5=None,
    words='ReLU reaches 25 % training error six times faster',
)


def get_config(scale: str = 'quickstart'):
    """Return the base with 'tanh' instead of 'relu', and biases of 0."""
    config = alexnet.get_config(scale)
    config.name = 'ablation_tanh'
    alexnet.activate(config.model, 'tanh')
    return config
