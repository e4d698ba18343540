"""Slurm and Open MPI are for `make test-cluster`, which names the files; all else passes it by."""

collect_ignore = ['test_slurm.py', 'test_sweep_slurm.py']
