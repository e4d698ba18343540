"""Using a trained net: evaluation, classification, features."""
