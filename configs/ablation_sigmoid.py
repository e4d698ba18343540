"""Ablation: the logistic sigmoid instead of ReLU.

    python main.py --config=configs/ablation_sigmoid.py

The paper compares ReLU with tanh (3.1). Tutorials give ReLU, as opposed to the sigmoid, as the
reason why AlexNet trains, without a figure.

The biases of 1, which are meant for ReLU, become 0 as in ablation_tanh.py; init and rates are
unchanged. The initialisation collapses, and the pre-flight check warns: a sigmoid's slope is at
most 1/4, so after eight layers the logits vary by 2e-6 across images (0.05 with ReLU), and the loss
stays at ln(classes). The result shows that this recipe needs ReLU, not how well another recipe
could perform with sigmoids.
"""

from configs import Claim, alexnet

CLAIM = Claim(
    row='sigmoid instead of ReLU',
    source='tutorials',
    data='none',
    top1=None,
    top5=None,
    words='gradients vanish',
)


def get_config(scale: str = 'quickstart'):
    """Return the base with 'sigmoid' instead of 'relu', and biases of 0."""
    config = alexnet.get_config(scale)
    config.name = 'ablation_sigmoid'
    alexnet.activate(config.model, 'sigmoid')
    return config
