"""From masks to a smaller model: decide, plan, cut, verify."""

from compress.speedup.speedup import ModelSpeedup

__all__ = ["ModelSpeedup"]
