"""Smaller weight rates for the rows of the contribution table that do not train at the base's.

python -m experiments.sweep contribution_rates --scale=quickstart --seeds=3
"""

CONFIGS = ('ablation_dropout', 'ablation_sigmoid')
OVERRIDES = {
    'rate0.01': {'optimizer.weights.rate': 0.01},
    'rate0.005': {'optimizer.weights.rate': 0.005},
}
