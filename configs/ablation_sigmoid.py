"""Ablation: the logistic sigmoid in the place of ReLU.

    python main.py --config=configs/ablation_sigmoid.py

Not in the paper, which has tanh (3.1); tutorials name ReLU against the sigmoid as what let AlexNet
train. No figure.

As in ablation_tanh.py the biases of 1, which are ReLU's, go too; weights' init and rates stay. The
start is dead, and the pre-flight check says so: a sigmoid's slope is 1/4 at best, eight layers in a
row leave the logits 2e-6 apart (0.05 with ReLU), and the loss sits at ln(classes). The row of a
table says that this recipe needs ReLU, not how well some other recipe could do with sigmoids.
"""

from configs import Claim, alexnet

CLAIM = Claim(
    row='sigmoid for ReLU',
    source='tutorials',
    data='none',
    top1=None,
    top5=None,
    words='gradients vanish',
)


def get_config(scale: str = 'quickstart'):
    """Base, every 'relu' a 'sigmoid', and the ReLUs' biases of 1 gone."""
    config = alexnet.get_config(scale)
    config.name = 'ablation_sigmoid'
    alexnet.activate(config.model, 'sigmoid')
    return config
