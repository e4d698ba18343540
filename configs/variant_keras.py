"""The Keras tutorial's AlexNet: one tower, uniform init, no LRN.

    python main.py --config=configs/variant_keras.py
    python main.py --config=configs/variant_keras.py:imagenet2012 --mode=describe

Reported: nothing. 62,378,344 parameters with 1000 classes, 58,691,044 with the tutorial's 100.

Differs from 2012 in: one tower, no LRN, ReLU before every pooling, 227 px unpadded (the text prints
277 but means 227: with 277, fc6 would read 7 x 7 maps), inverted dropout, biases of 0, plain SGD at
Keras' default of 0.01. The five convolutions start uniform in +-0.05 (`kernel_initializer=
'uniform'`), the three dense layers with Keras' default, Glorot's uniform.

Not given in the text, and chosen here: pixels in 0-1; batch size, epochs and splits of the base; as
many classes as in the data. A narrowed net scales +-0.05 with the fan-in.
"""

import math

from configs import _tutorial, alexnet

REPORTED = None
LIMIT = 0.05


def get_config(scale: str = 'quickstart'):
    """Return Keras' net, at one of alexnet.SCALES."""
    config = _tutorial.get_config(scale, 'variant_keras', full_px=227)
    config.data.update(alexnet.data(scale))
    model = config.model
    model.conv1.padding_px = ((0, 0), (0, 0))
    model.init_scaling = 'none' if scale.startswith('imagenet') else 'fan_in'
    for name in ('conv1', 'conv2', 'conv3', 'conv4', 'conv5'):
        model[name].update(init='uniform', init_std=LIMIT / math.sqrt(3))
    return config
