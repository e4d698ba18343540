"""Code shared by the AlexNets of the tutorials; each variant_*.py adds its differences."""

from ml_collections import ConfigDict

from configs import alexnet

WIDTHS = dict(conv1=96, conv2=256, conv3=384, conv4=384, conv5=256, fc6=4096, fc7=4096)


def get_config(scale: str, name: str, full_px: int = 224) -> ConfigDict:
    """Return a net of one tower without normalisation, with inverted dropout and plain SGD.

    Images are not cropped, mirrored or colour-augmented. At the scale fashion_mnist all 60,000
    training images are used. Rates are constant, the same for weights and biases, without weight
    decay.
    """
    config = alexnet.get_config(scale)
    config.name = name
    px = 112 if scale == 'quickstart' else full_px
    config.model.input_px = px
    images(config.preprocess, px)
    if scale == 'fashion_mnist':
        # As in the tutorials, all images are trained on, and the curve is of the test set. No
        # decision depends on it, as the rates are constant.
        config.data.train, config.data.validation = 'train', 'test'
    config.optimizer.update(momentum=0.0, weight_decay=0.0)
    rates(config.optimizer, alexnet.schedule('constant', 0.01))
    table(config.model, divisor=4 if scale == 'quickstart' else 1)
    return config


def images(preprocess, px: int) -> None:
    """Use uncropped images of `px`, divided by 255, without any augmentation."""
    preprocess.resize_px = preprocess.image_px = px
    preprocess.crop = preprocess.mirror = False
    preprocess.colour_noise, preprocess.noise_divisor = 0.0, 1.0
    preprocess.mean, preprocess.scale = 'none', 1 / 255


def rates(optimizer, schedule: dict) -> None:
    """Use one schedule for weights and biases, and freeze no layer."""
    optimizer.weights.update(schedule)
    optimizer.biases.update(schedule)
    optimizer.late_freeze.layer = 'none'


def table(model, divisor: int) -> None:
    """Set the widths, divided; ReLU before pooling and dropout; Xavier's initialisation."""
    model.towers = 1
    model.dropout.kind = 'inverted'
    model.init_scaling = 'none'  # Xavier's std depends on the fan-in anyway
    for name in model.layers:
        layer = model[name]
        layer.reads, layer.init, layer.bias = 'all', 'xavier', 0.0
        layer.ops = tuple(op for op in layer.ops if op in ('relu', 'dropout'))
        if name in WIDTHS:
            layer.features = WIDTHS[name] // divisor
    for name in ('conv1', 'conv2', 'conv5'):
        model[name].ops = ('relu', 'pool')
    fan_ins = dict(conv2=5 * 5 * 96, conv4=3 * 3 * 384, conv5=3 * 3 * 384)
    for name, fan_in in fan_ins.items():
        model[name].reference_fan_in = fan_in
