"""Small models in files: weights as safetensors, and a recipe that makes the user's class fit them.

Nothing in such a file is ever executed. `read_recipe` tells what a file says of itself.
"""

from compress.checkpoint.configuration import update_config
from compress.checkpoint.files import read_recipe
from compress.checkpoint.loading import load
from compress.checkpoint.recipe import Recipe
from compress.checkpoint.saving import save
from compress.checkpoint.shrinking import shrink_checkpoint

__all__ = ["Recipe", "load", "read_recipe", "save", "shrink_checkpoint", "update_config"]
