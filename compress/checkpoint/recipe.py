"""The recipe: what turns the dense class into the small model, as JSON that is checked when read.

A recipe says how the model was shrunk (plans, in order) and what every tensor of the weights is
(type, shape, SHA-256), so that a file which is damaged, or is that of other weights, is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from compress.errors import CheckpointError
from compress.speedup.encoding import Count, Strict, decode_plan
from compress.speedup.plan import Plan

FORMAT = "compress.checkpoint"
FORMAT_VERSION = 1
_TOLD = 5  # of many problems, the first say enough


class TensorRecord(Strict):
    """One tensor of the weights.

    ``dtype`` as safetensors names it. ``stride``: where it is not laid out row by row (channels
    last). ``persistent``: whether it is in the ``state_dict``.
    """

    dtype: str
    shape: list[Count]
    sha256: str
    stride: list[Count] | None = None
    persistent: bool = True


class Recipe(Strict):
    """How to make a small model of the user's class, and which weights are its own.

    Attributes:
        model: the class, for messages.
        plans: what was cut, in order, as `compress.speedup.encoding` has it.
        tensors: every parameter and buffer by path; a tied one once, by its first path.
        masks: of a model that was saved with masks on: which tensor masks which parameter.
        tied: other paths of these parameters and buffers, with the path that they are stored under;
            None where the model itself was not at hand.
        versions: of compress and torch.
        provenance: what the user gave: config_list, pruner, metrics.
    """

    model: str
    plans: list[dict[str, Any]]
    tensors: dict[str, TensorRecord]
    masks: dict[str, str]
    tied: dict[str, str] | None
    versions: dict[str, str]
    provenance: dict[str, Any]

    def decoded_plans(self) -> list[Plan]:
        """Raises ValueError where one of them says something that no plan says."""
        return [decode_plan(plan) for plan in self.plans]


def recipe_text(recipe: Recipe) -> str:
    """A recipe as the text of which its digest is taken."""
    return canonical(recipe.model_dump(mode="json"))


def canonical(data: Any) -> str:
    """JSON in which equal values are equal texts."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def parse_recipe(where: str, text: str, version: Any, sha256: Any) -> Recipe:
    """The recipe of a text that was read from a file.

    Raises:
        CheckpointError: it is of a newer release, damaged, or not what a recipe is.
    """
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise CheckpointError(
            f"{where}: a checkpoint of format version {version!r}; this release reads up to "
            f"{FORMAT_VERSION}; install a newer compress"
        )
    data = parse_json(where, text)
    try:
        intact = digest(canonical(data)) == sha256
    except (ValueError, RecursionError):
        intact = False
    if not intact:
        raise CheckpointError(
            f"{where}: the recipe is not the one that was written (its SHA-256 differs): the file "
            "is damaged or was edited; save the model again"
        )
    try:
        recipe = Recipe.model_validate(data)
        recipe.decoded_plans()
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{where}: this is no recipe: {described(error)}; expected one written by compress.save"
        ) from error
    return recipe


def parse_json(where: str, text: str) -> Any:
    """JSON without NaN and infinity; raises CheckpointError."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{where}: the recipe is no JSON ({error}); expected one written by compress.save"
        ) from error


def check_provenance(provenance: Mapping[str, Any] | None) -> dict[str, Any]:
    """A copy of what the user wants to keep; raises CheckpointError where it is not JSON."""
    if provenance is None:
        return {}
    if not isinstance(provenance, Mapping):
        raise CheckpointError(
            f"provenance: got {type(provenance).__name__}; expected a dict of JSON values"
        )
    try:
        copied: dict[str, Any] = json.loads(json.dumps(dict(provenance), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"provenance: {error}; expected JSON: numbers (no NaN), strings, lists and dicts of "
            "these"
        ) from error
    return copied


def raise_problems(what: str, problems: list[str]) -> None:
    """One error of all that is wrong, shortened; nothing where nothing is."""
    if problems:
        more = [f"and {len(problems) - _TOLD} more"] if len(problems) > _TOLD else []
        raise CheckpointError("\n  ".join([f"{what}:", *problems[:_TOLD], *more]))


def described(error: Exception) -> str:
    """An error of reading in one line."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        return f"{place}: {first['msg']}"
    return str(error)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
