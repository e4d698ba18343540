"""Tests; conftest.py sets up the devices and data that they use."""
