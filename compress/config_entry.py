"""One entry of a config_list by itself: its keys, their types, and what they say together."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Annotated, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from compress.errors import closest


def _as_list(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _as_patterns(value: object) -> object:
    return [value] if isinstance(value, str) else _as_list(value)


def _as_float(value: object) -> object:
    # numpy's numbers are welcome; a bool is a mistake, though Python calls it a number.
    if isinstance(value, bool):
        return value
    return float(value) if isinstance(value, Real) else value


Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False), BeforeValidator(_as_float)]
_Limit = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), BeforeValidator(_as_float)]
_Name = Annotated[str, Field(min_length=1)]


_SPARSITIES = ("sparsity", "sparsity_per_layer", "total_sparsity")
SELECTORS = ("op_types", "op_names", "op_partial_names", "op_names_re")
_EXPECTED = {
    **dict.fromkeys(_SPARSITIES, "a number in [0, 1)"),
    "max_sparsity_per_layer": "a number in [0, 1], or a dict {layer name: number in [0, 1]}",
    "op_types": 'a list of class names, such as ["Conv2d"] or ["default"]',
    "op_names": 'a list of module paths, such as ["layer1.0.conv1"]',
    "op_partial_names": 'a list of parts of module paths, such as ["layer1."]',
    "op_names_re": r'a list of regular expressions, such as ["^layer\\d"]',
    "exclude": "True or False",
}
# One of these is in each entry of NNI v3.
_NNI_V3 = dict.fromkeys(
    ("sparse_ratio", "sparse_threshold", "target_settings"),
    "; it is NNI v3's: compress.compat.nni.translate(config_list, model) translates such a list",
)


class Entry(BaseModel):
    """One dict of a config_list, of the right types; None = not given."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    SPARSITIES: ClassVar[tuple[str, ...]] = _SPARSITIES
    EXPECTED: ClassVar[Mapping[str, str]] = _EXPECTED

    sparsity: Fraction | None = None
    sparsity_per_layer: Fraction | None = None
    total_sparsity: Fraction | None = None
    max_sparsity_per_layer: _Limit | dict[str, _Limit] | None = None
    op_types: Annotated[list[_Name] | None, Field(min_length=1), BeforeValidator(_as_list)] = None
    # "" is a name: that of the model itself.
    op_names: Annotated[list[str] | None, Field(min_length=1), BeforeValidator(_as_list)] = None
    op_partial_names: Annotated[
        list[_Name] | None, Field(min_length=1), BeforeValidator(_as_list)
    ] = None
    op_names_re: Annotated[
        list[_Name] | None, Field(min_length=1), BeforeValidator(_as_patterns)
    ] = None
    exclude: bool = False

    def sparsities(self) -> dict[str, float]:
        """The sparsities given, by key."""
        given = {key: getattr(self, key) for key in self.SPARSITIES}
        return {key: value for key, value in given.items() if value is not None}

    def limit(self, name: str) -> float:
        """``max_sparsity_per_layer`` of one layer."""
        limits = self.max_sparsity_per_layer
        if isinstance(limits, dict):
            return limits.get(name, 1.0)
        return 1.0 if limits is None else limits

    def contradictions(self, where: str) -> list[str]:
        """What the keys say against each other."""
        problems = []
        given = self.sparsities()
        if self.exclude and given:
            problems.append(
                f"{where}: exclude is True, but {', '.join(given)} is given; an excluded layer has "
                "no sparsity: remove one of the two"
            )
        if not self.exclude and len(given) != 1:
            problems.append(
                f"{where}: got {' and '.join(given) or 'no sparsity'}; expected exactly one of "
                f"{', '.join(self.SPARSITIES)}, or exclude: True"
            )
        if self.max_sparsity_per_layer is not None and "total_sparsity" not in given:
            problems.append(
                f"{where}['max_sparsity_per_layer']: it limits layers under a total_sparsity, and "
                "this entry has none"
            )
        if all(getattr(self, key) is None for key in SELECTORS):
            problems.append(
                f"{where}: it selects no layer; add a selector ({', '.join(SELECTORS)}), such as "
                '"op_types": ["default"] for every layer that the pruner supports'
            )
        return problems


def parse(where: str, raw: object, problems: list[str], kind: type[Entry] = Entry) -> Entry | None:
    """The entry, of class ``kind``, or None with what is wrong added to ``problems``."""
    if not isinstance(raw, Mapping):
        problems.append(f"{where}: got {short(raw)}; expected a dict")
        return None
    unknown = [key for key in raw if key not in kind.EXPECTED]
    for key in unknown:
        hint = _NNI_V3.get(key) or closest(key, kind.EXPECTED) if isinstance(key, str) else ""
        problems.append(
            f"{where}: unknown key {key!r}{hint or '; expected one of ' + ', '.join(kind.EXPECTED)}"
        )
    known = {key: value for key, value in raw.items() if key in kind.EXPECTED}
    try:
        entry = kind.model_validate(known)
    except ValidationError as error:
        # A union reports each of its members; the user wants each key once.
        wrong = dict.fromkeys(str(one["loc"][0]) for one in error.errors())
        problems.extend(
            f"{where}[{key!r}]: got {short(raw[key])}; expected {kind.EXPECTED[key]}"
            for key in wrong
        )
        # The rest of the entry is still looked at, so that one error tells every problem.
        unknown.extend(wrong)
        entry = kind.model_validate({k: v for k, v in known.items() if k not in wrong})
    if not unknown:  # a misspelt or wrong key would be reported again as a missing one
        problems.extend(entry.contradictions(where))
    return entry if any(getattr(entry, key) is not None for key in SELECTORS) else None


def short(value: object) -> str:
    text = repr(value)
    text = text if len(text) <= 60 else text[:57] + "..."
    return text if isinstance(value, (bool, int, float, str)) else f"{type(value).__name__} {text}"
