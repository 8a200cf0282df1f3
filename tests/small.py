"""The small configurations that the tests share."""

import dataclasses

from dtn_fast import DTNConfig
from dtn_fast.data.config import SyntheticConfig
from dtn_fast.train.config import Recipe

SMALL = DTNConfig(
    image_size=64,
    channels=(8, 8, 16, 16, 64),
    convs=(1, 1, 1, 1, 1),
    expert_hidden=16,
    depth=1,
    num_heads=2,
    mlp_ratio=1,
)
"""The smallest DTN with every part."""
RECIPE = Recipe(epochs=2, batch_size=8, lr=1e-3, generations=2, gain="any", precision="fp32")
SET = SyntheticConfig(train=4, val=2, test=2, frames=3, seed=5)  # dlib finds every face of seed 5


def changed(recipe: Recipe, **fields: object) -> Recipe:
    """The recipe with some fields replaced."""
    return dataclasses.replace(recipe, **fields)
