"""A smoke test that takes seconds: the two-tower net at 1/8 width and 64 px, on 1,024 images.

    python main.py --config=configs/smoke.py

It checks that the program runs from start to end on this machine. Its accuracy has no meaning.
"""

from configs import alexnet

SCALES = ('quickstart',)


def get_config(scale: str = 'quickstart'):
    """Return the base recipe, shrunk, at the scale 'quickstart'."""
    config = alexnet.get_config(scale)
    config.name = 'smoke'
    config.batch_size = 64
    config.epochs = 2.0
    config.data.train = 'train[:1024]'
    config.data.validation = 'train[55000:55256]'
    config.data.test = 'test[:500]'
    config.model.input_px = config.preprocess.resize_px = 64
    config.preprocess.image_px = 68
    alexnet.narrow(config.model, 2)
    config.loop.log_every_steps = 4
    config.loop.eval_batch_size = 128
    return config
