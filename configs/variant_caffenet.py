"""Caffe's reference CaffeNet: bvlc_alexnet with pooling before LRN, and biases of 1.

    python main.py --config=configs/variant_caffenet.py:imagenet2012
    python -m alexnet_jax weights import caffenet bvlc_reference_caffenet.npz --workdir=W

The weights: http://dl.caffe.berkeleyvision.org/bvlc_reference_caffenet.caffemodel, 244 MB, sha1
4c8d77deb20ea792f84eb5e6d0a11ca0a8660a46, released for unrestricted use. `python -m alexnet_jax
weights
--help` explains how to convert them to .npz. Expect on ILSVRC-2012 val, centre crop, according to
Caffe's model zoo: 57.4 % top-1 and 80.4 % top-5 accuracy (not run here: neither the file nor the
data were available).
"""

from configs import variant_bvlc_alexnet


def get_config(scale: str = 'quickstart'):
    """Return bvlc_alexnet with two changes, at one of alexnet.SCALES."""
    config = variant_bvlc_alexnet.get_config(scale)
    config.name = 'variant_caffenet'
    model = config.model
    model.conv1.ops = model.conv2.ops = ('relu', 'pool', 'lrn')
    for name in model.layers:
        model[name].bias = 1.0 if model[name].bias else 0.0
    return config
