"""How far scores and features may be from those that they stand for: the one place where it is said."""

from typing import Final

SCORES_LIMIT: Final = {"fp32": 1e-4, "fp16": 0.02, "bf16": 0.02}
"""The largest difference of a score, on the scale of 0-10, by the precision of what is held to it."""

FEATURES_LIMIT: Final = {"fp32": 1e-4, "fp16": 5e-3}
"""The largest relative error of a clip's features, as Euclidean norms."""
