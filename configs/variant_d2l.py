"""d2l's AlexNet (Dive into Deep Learning, PyTorch): one tower with 2012's widths, grey images.

    python main.py --config=configs/variant_d2l.py                  # a quarter of the widths
    python main.py --config=configs/variant_d2l.py:fashion_mnist    # d2l's own setting

Reported, on Fashion-MNIST at 224 px after 10 epochs: train loss 0.328, train accuracy 0.879,
test accuracy 0.885. 46,764,746 parameters.

Differs from 2012 in: one tower, no LRN, ReLU before every pooling, conv1 padded by 1 px on each
side (54 px, and 6400 inputs of fc6), inverted dropout, Xavier's init, biases of 0; pixels in 0-1,
no mean subtraction, no crops, mirrors or colour noise; plain SGD at 0.01, no momentum, no decay;
all 60,000 images. Differs from d2l in: the initial biases, which PyTorch draws from +-1 /
sqrt(fan-in).
"""

from configs import _tutorial

REPORTED = 0.885  # test accuracy
REPORTED_BY_EPOCH = {10: 0.885}
REPORTED_TRAINING = (0.328, 0.879, 10)  # loss, accuracy, in epoch


def get_config(scale: str = 'quickstart'):
    """Return d2l's net and training, at one of alexnet.SCALES."""
    config = _tutorial.get_config(scale, 'variant_d2l')
    config.epochs = 10.0
    config.model.conv1.padding_px = ((1, 1), (1, 1))
    return config
