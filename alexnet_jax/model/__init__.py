"""The paper: layers, operations, augmentation and optimiser, as pure functions of arrays."""
