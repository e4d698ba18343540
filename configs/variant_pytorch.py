"""The PyTorch tutorial's AlexNet: one tower, 2048 units in fc6 and fc7, dropout of 0.2.

    python main.py --config=configs/variant_pytorch.py
    python main.py --config=configs/variant_pytorch.py:imagenet2012 --mode=describe

Reported: nothing, and the text gives no training. 28,868,968 parameters with 1000 classes and three
channels.

Differs from 2012 in: one tower, no LRN, ReLU before every pooling, conv1 padded by 2 px on each
side, fc6 and fc7 of 2048, inverted dropout of 0.2 before fc6 and fc7, PyTorch's default init
(weights uniform in +-1 / sqrt(fan-in); its biases likewise, here 0). The text's table has the two
towers' geometry with padding [1, 2]; this net follows the tutorial's program.

Not given in the text, and chosen here: pixels of 2012 (0-255 minus the mean image; in 0-1 this init
collapses), uncropped images, SGD at 0.01 with momentum 0.9, no decay, the base's epochs and splits.
"""

from configs import _tutorial, alexnet

REPORTED = None


def get_config(scale: str = 'quickstart'):
    """Return the PyTorch tutorial's net, at one of alexnet.SCALES."""
    config = _tutorial.get_config(scale, 'variant_pytorch')
    config.data.update(alexnet.data(scale))
    config.preprocess.mean, config.preprocess.scale = 'image', 1.0
    config.optimizer.momentum = 0.9
    model = config.model
    model.dropout.keep = 0.8
    for name in model.layers:
        model[name].init = 'fan_in_uniform'
    for name in ('fc6', 'fc7'):
        model[name].features //= 2
    model.fc8.reference_fan_in = 2048
    model.conv1.padding_px = alexnet.SAME_5  # 2 on each side
    model.conv5.ops = ('relu', 'pool', 'dropout')
    model.fc6.ops = ('relu', 'dropout')
    model.fc7.ops = ('relu',)
    return config
