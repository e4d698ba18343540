"""Weights and graphs for exchange with other frameworks."""
