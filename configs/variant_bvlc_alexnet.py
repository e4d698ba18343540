"""Caffe's bvlc_alexnet, the replication that most of the literature calls AlexNet.

    python main.py --config=configs/variant_bvlc_alexnet.py:imagenet2012
    python -m alexnet_jax weights import bvlc_alexnet bvlc_alexnet.npz --workdir=W

The weights: http://dl.caffe.berkeleyvision.org/bvlc_alexnet.caffemodel, 244 MB, sha1
9116a64c0fbe4459d18f4bb6b56d647b63920377, released for unrestricted use. `python -m alexnet_jax
weights
--help` explains how to convert them to .npz. Expect on ILSVRC-2012 val, centre crop, according to
Caffe's model zoo: 57.1 % top-1 and 80.2 % top-5 accuracy, of images warped to 256 x 256 (not run
here: neither the file nor the data were available).

Differs from configs/alexnet.py, according to Caffe's train_val.prototxt, in: ReLU, LRN, pool in
conv1 and conv2, no spatial norm; LRN with k = 1, whose windows extend across groups;
227 px; bias 0.1; std 0.005 in fc6 and fc7; inverted dropout; no colour noise; rates divided by ten
every 100,000 of 450,000 steps of 256 images. The channels of the weights are BGR; an import
reverses them. Caffe's pooling rounds up, which changes nothing at these sizes.

k = 1 was tried in 2012: run 135 is run 131 with k = 2, 41.07 / 18.42 % against 40.93 / 18.57 % on
ILSVRC-2012 val, ten views, one seed each (layer-params-131.cfg, layer-params-135.cfg).
"""

from configs import alexnet

STEP, STEPS = 100_000, 450_000  # of the solver


def get_config(scale: str = 'quickstart'):
    """Return Caffe's net, preprocessing and solver, at one of alexnet.SCALES."""
    config = alexnet.get_config(scale)
    config.name = 'variant_bvlc_alexnet'
    if scale.startswith('imagenet'):
        config.batch_size, config.epochs = 256, 90.0
    net(config.model)
    config.preprocess.colour_noise, config.preprocess.noise_divisor = 0.0, 1.0
    # 227 px give 55, 27, 13 and 6 positions without a remainder; 99 px give 23, 11, 5 and 2.
    config.model.input_px = 99 if scale == 'quickstart' else 227
    if not scale.startswith('imagenet'):
        config.preprocess.resize_px = config.model.input_px
        config.preprocess.image_px = config.model.input_px + (8 if scale == 'quickstart' else 16)
    drops = tuple(config.epochs * STEP * i / STEPS for i in range(1, 5))
    for rates in (config.optimizer.weights, config.optimizer.biases):
        rates.update(alexnet.schedule('steps', rates.rate, at_epochs=drops))
    config.optimizer.late_freeze.layer = 'none'
    return config


def net(model) -> None:
    """Turn the table of 2012 into Caffe's; the widths are the same."""
    model.lrn.k, model.lrn_reads = 1.0, 'all'
    model.dropout.kind = 'inverted'
    for name in model.layers:
        layer = model[name]
        layer.init_std = 0.005 if name in ('fc6', 'fc7') else 0.01
        layer.bias = 0.1 if layer.bias else 0.0
    model.conv1.padding_px = ((0, 0), (0, 0))
    model.conv1.ops = model.conv2.ops = ('relu', 'lrn', 'pool')
    model.conv5.ops = ('relu', 'pool')
