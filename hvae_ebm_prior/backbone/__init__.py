"""The frozen model seen from its noise: the transform T, freezing, recognition, densities, checks of arguments.

Imports nothing of this package: everything else rests on it.
"""

from .transform import BackboneAdapter, NoiseTransform

__all__ = ["BackboneAdapter", "NoiseTransform"]
