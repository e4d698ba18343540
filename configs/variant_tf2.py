"""The TensorFlow 2 tutorial's AlexNet: one tower, the paper's init and rates, no LRN, no decay.

    python main.py --config=configs/variant_tf2.py
    python main.py --config=configs/variant_tf2.py:fashion_mnist
    python -m alexnet_jax prepare mnist --source=FOLDER   # the four idx files
    python main.py --config=configs/variant_tf2.py --config.data.name=mnist

Reported: nothing (it trains on MNIST's digits, enlarged to 224 px, and measures top-1 and top-5
errors; here on Fashion-MNIST unless `data.name` is mnist). 62,378,344 parameters with 1000
classes and three channels.

As in the paper: Gaussians of 0.01, biases of 1 in conv2 to conv5, fc6 and fc7 (also in conv3,
which starts at 0 in 2012), momentum 0.9, rate 0.01 divided by ten on a plateau of the validation
error, not below a floor, 90 epochs of batches of 128. Without: weight decay ("the framework has
none"), LRN, towers, crops, mirrors, colours. Dropout is inverted; ReLU comes before every pooling.

Not given in the text, and chosen here: pixels of 2012 (0-255 minus the mean image; in 0-1 the
logits vary by 1e-3 across images, close to a collapsed initialisation), conv1's padding of 2012,
patience of 3 epochs, a floor of 1e-5; 4 epochs at quickstart. A narrowed net scales 0.01 with the
fan-in.
"""

from configs import _tutorial, alexnet

REPORTED = None


def get_config(scale: str = 'quickstart'):
    """Return TensorFlow 2's net and training, at one of alexnet.SCALES."""
    config = _tutorial.get_config(scale, 'variant_tf2')
    config.epochs = 4.0 if scale == 'quickstart' else 90.0
    config.data.update(alexnet.data(scale))  # a plateau rule needs held-out images
    config.preprocess.mean, config.preprocess.scale = 'image', 1.0
    config.optimizer.momentum = 0.9
    _tutorial.rates(config.optimizer, alexnet.schedule('plateau', 0.01, floor=1e-5))
    model = config.model
    model.init_scaling = 'none' if scale.startswith('imagenet') else 'fan_in'
    for name in model.layers:
        ones = name not in ('conv1', 'fc8')
        model[name].update(init='gaussian', init_std=0.01, bias=1.0 if ones else 0.0)
    return config
