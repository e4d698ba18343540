"""Tests; conftest.py says what they run on."""
