"""Describing a net before training, and drawing it afterwards."""
