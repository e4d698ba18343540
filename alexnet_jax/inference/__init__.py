"""Use a trained net: evaluation, classification, features."""
