"""The device mesh, multi-process training, and CPU settings."""
