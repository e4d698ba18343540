"""The base in bfloat16 with float32 parameters, a row of the contribution table.

python -m experiments.sweep contribution_bfloat16 --scale=quickstart --seeds=5
"""

CONFIGS = ('alexnet',)
OVERRIDES = {'bfloat16': {'model.compute_dtype': 'bfloat16'}}
