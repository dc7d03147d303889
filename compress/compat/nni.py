"""config_lists and mask files that were made for NNI, all its versions.

`translate` makes of a config_list of NNI v1, v2 or v3 one for the pruners here, and of what v3
writes there but the pruners here take as arguments (``granularity``, ``dependency_group_id``) these
arguments. Its result prints what became of each key. Nothing is dropped silently: what makes no
difference here is listed with the reason, what would is a `ConfigError`.

- ``op_types``, ``op_names``, ``op_names_re`` and their ``exclude_…``: the layers that NNI selects
  (exact class names, regular expressions from the beginning of a name), as ``op_names``
- ``sparse_ratio``: ``sparsity_per_layer``; with ``global_group_id`` ``total_sparsity``, and then
  ``max_sparse_ratio`` is ``max_sparsity_per_layer``
- ``dependency_group_id``: ``mode="dependency_aware"``, which finds the groups in the model
- ``granularity``: which pruner it is says so: filters, or single weights; a block is ``block_size``
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from warnings import catch_warnings, simplefilter

import torch
from torch import Tensor, nn

from compress.config_entry import Entry, short
from compress.errors import ConfigError, MaskError, closest
from compress.masks import Masks

_SELECTORS = ("op_types", "op_names", "op_names_re")
_EXCLUDES = ("exclude_op_types", "exclude_op_names", "exclude_op_names_re")
_SETTINGS = (
    "sparse_ratio", "max_sparse_ratio", "min_sparse_ratio", "sparse_threshold", "granularity",
    "global_group_id", "dependency_group_id", "internal_metric_block", "apply_method", "align",
)  # fmt: skip
_TARGETS = ("target_names", "target_settings")
_V3 = (*_SELECTORS, *_EXCLUDES, *_TARGETS, *_SETTINGS)
_V3_ONLY = tuple(key for key in _V3 if key not in _SELECTORS)
_SCHEDULES = (
    "initial_sparsity", "final_sparsity", "start_epoch", "end_epoch", "frequency",
)  # fmt: skip
_REFUSED = {
    "sparse_threshold": "it has no counterpart here; give sparse_ratio",
    "internal_metric_block": "it has no counterpart here",
    **dict.fromkeys(
        ("quant_types", "quant_bits", "quant_dtype", "quant_scheme", "fuse_names"),
        "it is for quantization, and these pruners only prune",
    ),
    **dict.fromkeys(("lambda", "link"), "it is for distillation: compress.training.Distillation"),
}


@dataclass(frozen=True)
class Translation:
    """A config_list for the pruners here, and what was made of NNI's; prints it.

    Attributes:
        config_list: to be passed to a pruner.
        arguments: to be passed beside it: ``mode``, ``block_size``.
        mapped: what stands for what, a line for each.
        left_out: what has no counterpart and needs none, with the reason, a line for each.
    """

    config_list: list[dict[str, Any]]
    arguments: dict[str, Any] = field(default_factory=dict)
    mapped: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = ["config_list:", *(f"  {entry}" for entry in self.config_list)]
        if self.arguments:
            given = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
            lines += [f"arguments of the pruner: {given}"]
        for title, notes in (("mapped:", self.mapped), ("left out:", self.left_out)):
            lines += [title, *(f"  {note}" for note in notes)] if notes else []
        return "\n".join(lines)


def translate(config_list: Sequence[Mapping[str, Any]], model: nn.Module) -> Translation:
    """A config_list of NNI v1, v2 or v3 as one for the pruners here.

    Lists of v1 and v2 (``sparsity``, ``total_sparsity``, ``exclude`` …, also with the epochs of
    scheduled pruners) have the keys of here, and stay as they are.

    Args:
        config_list: read only.
        model: the model that it is for, which says what v3's selectors select.

    Raises:
        ConfigError: lists everything that cannot be honoured, by entry and key.
    """
    if not isinstance(config_list, (list, tuple)) or not config_list:
        raise ConfigError(
            f"config_list: got {short(config_list)}; expected a list of dicts with at least one"
        )
    translator = _Translator(model)
    for index, raw in enumerate(config_list):
        translator.add(f"config_list[{index}]", raw)
    return translator.result()


class _Translator:
    """Entries of NNI one after the other, and what has been made of them so far."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.types = {name: type(module).__name__ for name, module in self.modules.items()}
        self.entries: list[dict[str, Any]] = []
        self.groups: dict[Any, dict[str, Any]] = {}
        self.arguments: dict[str, Any] = {}
        self.mapped: list[str] = []
        self.left_out: list[str] = []
        self.problems: list[str] = []

    def result(self) -> Translation:
        """The translation; raises ConfigError where anything cannot be honoured."""
        if self.problems:
            raise ConfigError("this config_list of NNI cannot be honoured:", self.problems)
        return Translation(self.entries, self.arguments, tuple(self.mapped), tuple(self.left_out))

    def add(self, where: str, raw: object) -> None:
        """Translate one entry."""
        if not isinstance(raw, Mapping):
            self.problems.append(f"{where}: got {short(raw)}; expected a dict")
            return
        own = (*Entry.EXPECTED, *_SCHEDULES)
        known = {key: raw[key] for key in raw if key in (*_V3, *own)}
        for key in (key for key in raw if key not in known):
            reason = _REFUSED.get(key)
            hint = closest(key, (*_V3, *own)) if isinstance(key, str) else ""
            told = f"[{key!r}]: {reason}" if reason else f": unknown key {key!r}{hint}"
            self.problems.append(f"{where}{told}")
        is_new = [key for key in known if key in _V3_ONLY]
        is_old = [key for key in known if key not in _V3]
        if is_new and is_old:
            self.problems.append(
                f"{where}: {', '.join(is_new)} are keys of NNI v3 and {', '.join(is_old)} of v1 "
                "and v2; expected one kind in an entry"
            )
        elif is_new:
            self._add_v3(where, known)
        elif len(known) == len(raw):
            self.entries.append(dict(known))
            self.mapped.append(f"{where}: as it is; its keys are the same here")
            self._tell_subclasses(where, known.get("op_types"))

    def _tell_subclasses(self, where: str, asked: object) -> None:
        """What a type matches here, but not in NNI."""
        wanted = set(asked) if isinstance(asked, (list, tuple)) else set()
        more = {
            kind
            for name, kind in self.types.items()
            if kind not in wanted
            and wanted & {c.__name__ for c in type(self.modules[name]).__mro__}
        }
        if more:
            self.left_out.append(
                f"{where}['op_types']: subclasses match here, and not in NNI: "
                f"{', '.join(sorted(more))}; exclude them if they shall stay"
            )

    # -- v3 ------------------------------------------------------------------------------------

    def _add_v3(self, where: str, given: dict[str, Any]) -> None:
        before = len(self.problems)
        layers = self._select(where, given)
        setting = self._setting(where, given)
        for key in ("sparse_threshold", "internal_metric_block"):
            if setting.get(key) is not None:
                self.problems.append(f"{where}[{key!r}]: {_REFUSED[key]}")
        entry = {"op_names": layers, **self._sparsity(where, setting)}
        self._set_arguments(where, setting)
        self._check_way(where, setting)
        if len(self.problems) > before:
            return
        selectors = [key for key in (*_SELECTORS, *_EXCLUDES) if given.get(key)]
        self.mapped.append(f"{where}: {', '.join(selectors)} -> op_names, {len(layers)} layers")
        group = setting.get("global_group_id")
        if group is None:
            self.entries.append(entry)
            self.mapped.append(f"{where}: sparse_ratio -> sparsity_per_layer")
        else:
            self._join(where, group, entry)

    def _select(self, where: str, given: Mapping[str, Any]) -> list[str]:
        """The modules that NNI selects, in model order."""
        values: dict[str, list[str]] = {}
        for key in (*_SELECTORS, *_EXCLUDES):
            value = given.get(key) or []
            if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
                self.problems.append(f"{where}[{key!r}]: got {short(value)}; expected strings")
                return []
            values[key] = list(value)
        if not any(values[key] for key in _SELECTORS):
            self.problems.append(
                f"{where}: it selects no layer; add one of {', '.join(_SELECTORS)}"
            )
            return []
        self._check_names(where, values)
        try:
            found = [name for name in self.modules if self._is_selected(name, values)]
        except re.error as error:
            self.problems.append(f"{where}: no regular expression: {error}")
            return []
        layers = [n for n in found if isinstance(getattr(self.modules[n], "weight", None), Tensor)]
        if not layers:
            self.problems.append(f"{where}: it selects no layer with a weight")
        elif len(layers) < len(found):
            without = len(found) - len(layers)
            self.left_out.append(f"{where}: {without} selected modules have no weight to mask")
        return layers

    def _is_selected(self, name: str, values: Mapping[str, list[str]]) -> bool:
        kind = self.types[name]
        if values["op_names"] or values["op_names_re"]:
            named = name in values["op_names"] or _matches(values["op_names_re"], name)
            if not named:
                return False
        if values["op_types"] and kind not in values["op_types"]:
            return False
        return not (
            name in values["exclude_op_names"]
            or _matches(values["exclude_op_names_re"], name)
            or kind in values["exclude_op_types"]
        )

    def _check_names(self, where: str, values: Mapping[str, list[str]]) -> None:
        """Names and types that the model does not have, which NNI passes over."""
        kinds = set(self.types.values())
        for keys, existing, severe in (
            (("op_names", "op_types"), (self.modules, kinds), True),
            (("exclude_op_names", "exclude_op_types"), (self.modules, kinds), False),
        ):
            for key, known in zip(keys, existing, strict=True):
                for value in values[key]:
                    if value not in known:
                        told = f"{where}[{key!r}]: the model has no {value!r}"
                        (self.problems if severe else self.left_out).append(
                            told + closest(value, known)
                        )

    def _setting(self, where: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """What is asked of the weight: settings of the entry, then of the target."""
        own = {key: given[key] for key in _SETTINGS if key in given}
        names = given.get("target_names", ["weight", "bias"])
        settings = given.get("target_settings") or {}
        if not isinstance(settings, Mapping):
            self.problems.append(
                f"{where}['target_settings']: got {short(settings)}; expected a dict"
            )
            return own
        for target in dict.fromkeys([*names, *settings]):
            if target not in ("weight", "bias"):
                self.problems.append(
                    f"{where}: target {target!r}; these pruners mask weights and their biases only"
                )
        if "weight" not in names:
            self.problems.append(f"{where}['target_names']: got {names!r}; expected 'weight' in it")
        elif "bias" not in names:
            self.left_out.append(
                f"{where}['target_names']: without 'bias', but pruners of filters mask the bias of "
                "a filter that goes, as nothing could be removed else"
            )
        self._check_bias(where, settings.get("bias") or {})
        weight = settings.get("weight") or {}
        for key in (key for key in weight if key not in _SETTINGS):
            told = _REFUSED.get(key) or f"unknown key{closest(str(key), _SETTINGS)}"
            self.problems.append(f"{where}['target_settings']['weight'][{key!r}]: {told}")
        return {**own, **{key: value for key, value in weight.items() if key in _SETTINGS}}

    def _check_bias(self, where: str, bias: Mapping[str, Any]) -> None:
        """A bias is masked with its filter: anything else asked of it cannot be had."""
        place = f"{where}['target_settings']['bias']"
        align = bias.get("align") or {}
        if align and (align.get("target_name") != "weight" or align.get("module_name")):
            self.problems.append(
                f"{place}['align']: got {align!r}; a bias goes with its own weight"
            )
        elif align:
            self.mapped.append(f"{place}['align']: a filter's bias goes with it")
        for key, value in bias.items():
            if key not in ("align", "apply_method", "granularity"):
                self.problems.append(
                    f"{place}[{key!r}]: got {value!r}; a bias is not pruned by itself, it goes "
                    "with its filter"
                )
            elif key != "align":
                self.left_out.append(f"{place}[{key!r}]: a filter's bias goes with it")

    def _sparsity(self, where: str, setting: Mapping[str, Any]) -> dict[str, Any]:
        """The sparsity keys of here."""
        ratio, most = setting.get("sparse_ratio"), setting.get("max_sparse_ratio")
        least = setting.get("min_sparse_ratio")
        for key, value in (("sparse_ratio", ratio), ("max_sparse_ratio", most)):
            wrong = not isinstance(value, (int, float)) or not 0 <= value <= 1
            wrong = wrong or (value == 1 and key == "sparse_ratio")
            if wrong and (value is not None or key == "sparse_ratio"):
                told = "it is missing" if value is None else f"got {short(value)}"
                self.problems.append(f"{where}[{key!r}]: {told}; expected a number in [0, 1)")
                return {}
        if least:
            self.problems.append(
                f"{where}['min_sparse_ratio']: got {least!r}; there is no least sparsity of a "
                "layer here; give the layers that shall lose so much an entry of their own"
            )
        if setting.get("global_group_id") is not None:
            limit = {} if most is None else {"max_sparsity_per_layer": most}
            return {"total_sparsity": ratio, **limit}
        if most is not None and most < ratio:
            self.problems.append(
                f"{where}['max_sparse_ratio']: got {most!r}, less than the sparse_ratio {ratio!r}; "
                "without a global_group_id each layer loses exactly the latter"
            )
        elif most is not None:
            self.left_out.append(
                f"{where}['max_sparse_ratio']: without a global_group_id each layer loses exactly "
                "its sparse_ratio"
            )
        return {"sparsity_per_layer": ratio}

    def _join(self, where: str, group: Any, entry: dict[str, Any]) -> None:
        """Entries of the same global group are one entry here."""
        limit = entry.pop("max_sparsity_per_layer", None)
        limits = {} if limit is None else dict.fromkeys(entry["op_names"], limit)
        self.mapped.append(f"{where}: global_group_id {group!r} -> total_sparsity of one entry")
        self._argument(where, "mode", "global")
        first = self.groups.setdefault(group, {**entry, "op_names": []})
        if not first["op_names"]:
            self.entries.append(first)
        if first["total_sparsity"] != entry["total_sparsity"]:
            self.problems.append(
                f"{where}['sparse_ratio']: got {entry['total_sparsity']!r}, and global group "
                f"{group!r} has {first['total_sparsity']!r}; expected the same in all its entries"
            )
        first["op_names"] += [name for name in entry["op_names"] if name not in first["op_names"]]
        if limits:
            first["max_sparsity_per_layer"] = {**first.get("max_sparsity_per_layer", {}), **limits}
            self.mapped.append(f"{where}: max_sparse_ratio -> max_sparsity_per_layer")

    def _set_arguments(self, where: str, setting: Mapping[str, Any]) -> None:
        """What is an argument of the pruner here."""
        if setting.get("dependency_group_id") is not None:
            self._argument(where, "mode", "dependency_aware")
            self.mapped.append(f"{where}: dependency_group_id -> mode='dependency_aware'")
            self.left_out.append(
                f"{where}['dependency_group_id']: which layers are a group is found in the model; "
                "pass dummy_input to the pruner"
            )
        granularity = setting.get("granularity", "default")
        place = f"{where}['granularity']"
        if granularity in ("default", "out_channel"):
            if "granularity" in setting:
                self.left_out.append(f"{place}: {granularity!r} is up to the pruner: filters, or "
                                     "single weights with LevelPruner")  # fmt: skip
        elif _is_block(granularity):
            self._argument(where, "block_size", tuple(granularity[:2]))
            self.mapped.append(f"{place} -> block_size={tuple(granularity[:2])}, of LevelPruner")
        else:
            self.problems.append(
                f"{place}: got {short(granularity)}; expected 'default', 'out_channel', or a block "
                "[outputs, inputs], with 1s or nothing for the kernel"
            )

    def _argument(self, where: str, name: str, value: object) -> None:
        before = self.arguments.setdefault(name, value)
        if {before, value} == {"global", "dependency_aware"}:
            # A ranking over all layers that keeps coupled layers together.
            self.left_out.append(
                f"{where}: mode='global': a dependency_aware pruner ranks coupled layers together"
            )
            self.arguments[name] = "dependency_aware"
        elif before != value:
            self.problems.append(
                f"{where}: it needs {name}={value!r}, and an entry before it {name}={before!r}; a "
                "pruner has one for all layers: make two pruners"
            )

    def _check_way(self, where: str, setting: Mapping[str, Any]) -> None:
        """How a mask is applied, and to what it is aligned."""
        method = setting.get("apply_method")
        if method not in (None, "mul"):
            self.problems.append(
                f"{where}['apply_method']: got {method!r}; masks are multiplied here ('mul')"
            )
        elif method is not None:
            self.left_out.append(f"{where}['apply_method']: masks are always multiplied here")
        if setting.get("align"):
            self.problems.append(
                f"{where}['align']: got {setting['align']!r}; give the pruner "
                "mode='dependency_aware', which finds what goes together"
            )


def _matches(patterns: Iterable[str], name: str) -> bool:
    return any(re.match(pattern, name) for pattern in patterns)


def _is_block(granularity: object) -> bool:
    """Whether it is a block of outputs and inputs, whatever the kernel's size is."""
    return (
        isinstance(granularity, (list, tuple))
        and len(granularity) >= 2
        and all(type(size) is int and size >= 1 for size in granularity)
        and all(size == 1 for size in granularity[2:])
    )


# -- masks -------------------------------------------------------------------------------------


def load_masks(path: str | os.PathLike[str]) -> Masks:
    """The masks of a file that NNI wrote with ``torch.save``, v1, v2 or v3.

    Read with ``weights_only=True``: nothing in the file is executed.

    Raises:
        MaskError: there is no such file; it is damaged, or holds more than tensors; it has masks of
            inputs or outputs (v3) that mask something, which are not those of parameters.
    """
    name = os.fspath(path)
    if not Path(name).is_file():
        raise MaskError(f"{name}: there is no such file; expected masks that NNI saved")
    try:
        with catch_warnings():  # of pickle's protocols
            simplefilter("ignore")
            content = torch.load(name, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch.load raises whatever its unpickler meets in a damaged file.
        # An UnpicklingError is advice on how to run what the file holds, which nobody shall.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(error, UnpicklingError):
            reason = "it is damaged, or holds other objects, which would have to be executed"
        raise MaskError(
            f"{name}: it cannot be read as tensors only ({reason}); expected masks that NNI saved"
        ) from error
    if not isinstance(content, Mapping) or not all(
        isinstance(module, Mapping) for module in content.values()
    ):
        raise MaskError(
            f"{name}: it holds {short(content)}; expected {{module: {{parameter: mask}}}}, as "
            "NNI's pruners save it"
        )
    entries = {
        module: {
            target: mask
            for target, mask in targets.items()
            if not _is_of_data(f"{name}: {module!r}", target, mask)
        }
        for module, targets in content.items()
    }
    try:
        return Masks(entries)
    except MaskError as error:
        raise MaskError(f"{name}: {error}") from error


def _is_of_data(where: str, target: object, mask: object) -> bool:
    """Whether a mask is of an input or output; raises MaskError where it masks something."""
    if not isinstance(target, str) or not target.startswith(("_input", "_output")):
        return False
    if isinstance(mask, Tensor) and not bool((mask != 0).all()):
        raise MaskError(
            f"{where}: a mask of {target!r} masks a part of the activations; only parameters can "
            "be masked here: prune the layer that makes it"
        )
    return True
