"""What ``compress report`` tells of a job: in the terminal, and as a page."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

import compress
from compress.cli.job import Job
from compress.cli.loading import build_model, load_small, make_input, read_masks, user_code
from compress.cli.running import Answer, grid
from compress.errors import ConfigError
from compress.graph.channels import ChannelGraph
from compress.measure import Table, compare
from compress.reports import PruningReport
from compress.search import SearchResult, Sensitivity
from compress.speedup.speedup import ModelSpeedup

Scores = Callable[[dict[str, nn.Module]], dict[str, float]]


def told(job: Job) -> Answer:
    """What a speedup would do under the job's masks, or what the file of its small model says."""
    masks = read_masks(job)
    if masks is not None:
        planned = ModelSpeedup(
            build_model(job), make_input(job), masks, **job.speedup.model_dump()
        ).report
        return Answer({"report": asdict(planned)}, (str(planned),))
    if job.small is None:
        raise ConfigError("nothing to report: pass --masks FILE or --small FILE")
    recipe = compress.checkpoint.read_recipe(job.small)
    cuts = _cuts(job.small)
    data = {
        "model": recipe.model,
        "cuts": cuts,
        "provenance": recipe.provenance,
        "versions": recipe.versions,
    }
    rows: list[tuple[object, ...]] = [tuple(cut.values()) for cut in cuts]
    lines = [f"{name}: {value}" for name, value in {**recipe.provenance, **recipe.versions}.items()]
    return Answer(data, (grid(("parameter", "shape", "new shape"), rows), *lines))


def _cuts(small: str) -> list[dict[str, Any]]:
    return [
        {"parameter": path, "before": plan.shapes[path], "after": cut.shape(plan.shapes[path])}
        for plan in compress.checkpoint.read_recipe(small).decoded_plans()
        for path, cut in plan.slices.items()
    ]


def check_pages(html: Path | None, markdown: Path | None) -> None:
    """Raise for files that are no pages, before the work is done."""
    for option, path, suffix in (("--html", html, ".html"), ("--markdown", markdown, ".md")):
        if path is not None and path.suffix != suffix:
            raise ConfigError(f"{option}: got {path}; expected a file {suffix}")


def page(
    job: Job,
    scores: Scores,
    sensitivity: Path | None,
    search: Path | None,
    warmup: int,
    repeats: int,
) -> PruningReport:
    """Measure the job's models side by side, and put all there is on a page.

    With masks the model is cut down in memory, and held against the masked one.
    """
    parts: dict[str, Any] = {
        "sensitivity": None if sensitivity is None else Sensitivity.read(sensitivity),
        "search": None if search is None else SearchResult.read(search),
    }
    models, inputs, masks = {"dense": build_model(job).eval()}, make_input(job), read_masks(job)
    if masks is not None:
        masked = build_model(job).eval()
        masks.apply(masked)
        models |= {"masked": masked, "small": deepcopy(masked)}
        speedup = ModelSpeedup(models["small"], inputs, **job.speedup.model_dump())
        speedup.speedup_model()
        parts["speedup"] = speedup
        parts["verification"] = compress.verify(models["small"], masked, inputs)
    if job.small is not None and (masks is None or Path(job.small).exists()):
        models["small"] = load_small(job).eval()
    if masks is None:
        parts["graph"] = ChannelGraph(models["dense"], inputs)
    if job.small is not None and masks is None:
        rows = tuple(tuple(map(str, cut.values())) for cut in _cuts(job.small))
        parts["tables"] = {"What was cut": Table(("parameter", "shape", "new shape"), rows)}
    with user_code("model: running it"):
        parts["measurements"] = compare(models, inputs, warmup=warmup, repeats=repeats)
    if found := scores(models):
        parts["scores"] = {"score": found}
    name = job.model.factory if job.model is not None else ""
    return compress.report(f"Pruning report: {name}", **parts)
