"""Slurm and Open MPI are for `make test-cluster`, which names the file; all else passes it by."""

collect_ignore = ['test_slurm.py']
