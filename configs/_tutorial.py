"""What the AlexNets of the tutorials have in common; each variant_*.py has the rest."""

from ml_collections import ConfigDict

from configs import alexnet

WIDTHS = dict(conv1=96, conv2=256, conv3=384, conv4=384, conv5=256, fc6=4096, fc7=4096)


def get_config(scale: str, name: str, full_px: int = 224) -> ConfigDict:
    """One tower that reads all, no normalisation, inverted dropout; images as they are, whole.

    Pixels are not shifted, mirrored or coloured; the training set is all of Fashion-MNIST's 60,000
    at the scale fashion_mnist. Rates are constant, biases have the weights', nothing decays.
    """
    config = alexnet.get_config(scale)
    config.name = name
    px = 112 if scale == 'quickstart' else full_px
    config.model.input_px = px
    images(config.preprocess, px)
    if scale == 'fashion_mnist':
        # As there: all images train, and the curve is the test set's. Nothing depends on it, as the
        # rates are constant.
        config.data.train, config.data.validation = 'train', 'test'
    config.optimizer.update(momentum=0.0, weight_decay=0.0)
    rates(config.optimizer, alexnet.schedule('constant', 0.01))
    table(config.model, divisor=4 if scale == 'quickstart' else 1)
    return config


def images(preprocess, px: int) -> None:
    """Whole images, divided by 255, and nothing else done to them."""
    preprocess.resize_px = preprocess.image_px = px
    preprocess.crop = preprocess.mirror = False
    preprocess.colour_noise, preprocess.noise_divisor = 0.0, 1.0
    preprocess.mean, preprocess.scale = 'none', 1 / 255


def rates(optimizer, schedule: dict) -> None:
    """One schedule for weights and biases, and no layer frozen."""
    optimizer.weights.update(schedule)
    optimizer.biases.update(schedule)
    optimizer.late_freeze.layer = 'none'


def table(model, divisor: int) -> None:
    """96-256-384-384-256-4096-4096, widths divided; ReLU, then pooling or dropout; Xavier."""
    model.towers = 1
    model.dropout.kind = 'inverted'
    model.init_scaling = 'none'  # Xavier's scales by itself
    for name in model.layers:
        layer = model[name]
        layer.reads, layer.init, layer.bias = 'all', 'xavier', 0.0
        layer.ops = tuple(word for word in layer.ops if word in ('relu', 'dropout'))
        if name in WIDTHS:
            layer.features = WIDTHS[name] // divisor
    for name in ('conv1', 'conv2', 'conv5'):
        model[name].ops = ('relu', 'pool')
    fan_ins = dict(conv2=5 * 5 * 96, conv4=3 * 3 * 384, conv5=3 * 3 * 384)
    for name, fan_in in fan_ins.items():
        model[name].reference_fan_in = fan_in
