"""A sweep of smaller weight rates for the ablations that do not train at the base's rate.

python -m experiments.sweep contribution_rates --scale=quickstart --seeds=3
"""

CONFIGS = ('ablation_dropout', 'ablation_sigmoid')
OVERRIDES = {
    'rate0.01': {'optimizer.weights.rate': 0.01},
    'rate0.005': {'optimizer.weights.rate': 0.005},
}
