"""How much memory a run takes on each GPU, by how it is launched: arithmetic on a model's shape, without a model."""

from rlvr.planning.memory import ModelShape, Passes, estimates
from rlvr.planning.settings import Settings
from rlvr.planning.table import describe

__all__ = ["ModelShape", "Passes", "Settings", "describe", "estimates"]
