"""Describe a net before training, and draw figures of it afterwards."""
