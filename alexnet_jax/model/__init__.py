"""The paper's model: layers, operations, augmentation and optimiser, as pure functions."""
