"""Tests with a cluster: a Slurm of its own on this machine; see one_node.py."""
