"""LeNet, to which tutorials compare AlexNet: ReLU or sigmoid, max-pooling, 28 px.

    python main.py --config=configs/variant_lenet.py
    python main.py --config=configs/variant_lenet.py:sigmoid                  # at quickstart
    python main.py --config=configs/variant_lenet.py:fashion_mnist,sigmoid

Reported: "about the same" as AlexNet after five epochs. 170,988 parameters.

conv(20, 5) and conv(50, 3), unpadded, each with ReLU and max-pooling 2/2; fc 128 with ReLU; fc 10.
The training is Gluon's (variant_gluon.py), and so are Xavier's init and pixels in 0-1, which the
text does not give. Quickstart and fashion_mnist have the same net; the latter trains on all 60,000
images.

With 'sigmoid' every ReLU is a logistic sigmoid, as in the LeNet to which two tutorials compare
AlexNet. At this rate, 0.01 without momentum, the loss hardly moves from ln(10) = 2.303 in five
epochs (quickstart, seed 0: validation loss 2.297).
"""

from configs import _tutorial, alexnet

REPORTED = None
SCALES = ('quickstart', 'fashion_mnist')
ACTIVATIONS = ('relu', 'sigmoid')


def get_config(scale: str = 'quickstart,relu'):
    """Return LeNet; `scale` is one of SCALES, one of ACTIVATIONS, or both with a comma between."""
    scale, _, activation = scale.partition(',')
    if scale in ACTIVATIONS and not activation:
        scale, activation = 'quickstart', scale
    activation = activation or 'relu'
    if scale not in SCALES:
        raise ValueError(f"scale '{scale}' is not one of {', '.join(SCALES)}: LeNet sees 28 px")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation '{activation}' is not one of {', '.join(ACTIVATIONS)}")
    config = _tutorial.get_config(scale, 'variant_lenet')
    config.epochs = 5.0
    model = config.model
    for name in model.layers:
        del model[name]
    model.layers = ('conv1', 'conv2', 'fc3', 'fc4')
    model.conv1 = _conv(20, 5, 25)
    model.conv2 = _conv(50, 3, 9 * 20)
    model.fc3 = alexnet.fc(128, 'all', 0.0, 0.0, 5 * 5 * 50, ('relu',)) | dict(init='xavier')
    model.fc4 = alexnet.fc(10, 'all', 0.0, 0.0, 128, ()) | dict(init='xavier')
    if activation == 'sigmoid':
        config.name = 'variant_lenet_sigmoid'
        alexnet.activate(model, 'sigmoid')
    model.pool.window_px = 2
    model.input_px = 28
    _tutorial.images(config.preprocess, 28)
    return config


def _conv(features: int, kernel_px: int, fan_in: int) -> dict:
    unpadded = ((0, 0), (0, 0))
    row = alexnet.conv(features, kernel_px, 1, unpadded, 'all', 0.0, 0.0, fan_in, ('relu', 'pool'))
    return row | dict(init='xavier')
