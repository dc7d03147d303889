"""The commands, one function each: what is asked of the library, and the answer as a table."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

import compress
from compress.charts.figure import require_matplotlib
from compress.checkpoint.saving import file_of
from compress.cli.exporting import (
    calibration_inputs,
    check_options,
    write_float,
    write_int8,
)
from compress.cli.inspecting import coupled_groups, layer_facts
from compress.cli.job import Job
from compress.cli.loading import (
    build_model,
    load_small,
    make_evaluator,
    make_input,
    make_pruner,
    read_masks,
    resolve,
    user_code,
)
from compress.cli.reporting import check_pages, page, told
from compress.cli.running import Answer, grid, registrar, unwrapped
from compress.errors import ConfigError
from compress.export import RuntimeComparison, compare_runtimes
from compress.export.runtimes import RUNTIMES
from compress.files import check_writable
from compress.graph.channels import ChannelGraph
from compress.masks import applied_masks
from compress.measure import Latency, Measurement, compare, summarize, table
from compress.search.sensitivity_pruner import SPARSITIES
from compress.speedup.report import Report
from compress.speedup.speedup import ModelSpeedup

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
command = registrar(app)
TABLES = (".csv", ".json")
CURVES = (*TABLES, ".png", ".svg", ".pdf")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(compress.__version__)
        raise typer.Exit


def _compress(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Prune a PyTorch model under masks, then cut it down to a smaller one that computes the same.

    Every command takes a CONFIG file (YAML or JSON), or --model and --input; options go before what
    the file says. Paths are from the current directory, which is importable.

    Exit codes: 0 fine, 1 an error of what was given, 2 wrong usage.

    Example: [bold]compress inspect --model torchvision.models:resnet18 --input 1,3,64,64[/bold]
    """


app.callback(help=unwrapped(_compress))(_compress)


@command()
def inspect(job: Job) -> Answer:
    """Show layers, what could be pruned of each, and what holds the rest.

    Example: [bold]compress inspect --model torchvision.models:resnet18 --input 1,3,64,64[/bold]
    """
    model, inputs = build_model(job), make_input(job)
    facts = layer_facts(ChannelGraph(model, inputs))
    with user_code("model: running it"):
        summary = summarize(model, inputs)
    groups = coupled_groups(facts)
    rows: list[tuple[object, ...]] = [
        (
            each.layer, each.type, each.units, each.free, each.parameters, each.flops,
            "; ".join(f"{count}: it {reason}" for reason, count in each.held.items()),
        )
        for each in facts
    ]  # fmt: skip
    columns = ("layer", "type", "units", "can go", "parameters", "FLOPs", "what holds the others")
    data = {
        "parameters": summary.parameters_total,
        "mult_adds": summary.mult_adds,
        "flops": summary.flops,
        "layers": [asdict(each) for each in facts],
        "coupled": groups,
    }
    totals = (
        f"{summary.parameters_total:,} parameters, {summary.mult_adds:,} mult-adds, "
        f"{summary.flops:,} FLOPs"
    )
    together = [f"go together: {', '.join(names)}" for names in groups]
    return Answer(data, (grid(columns, rows), *together, totals))


@command("masks")
def explain(
    job: Job,
    layer: Annotated[str, typer.Argument(help="Path of a layer, such as layer1.0.conv1.")],
    channel: Annotated[int | None, typer.Option(help="One of its units, from 0.")] = None,
) -> Answer:
    """Say why a channel of LAYER stays or goes, or what the layer is coupled with.

    Of the structure alone, or with --masks under these.

    Example: [bold]compress explain layer1.0.conv2 --channel 3 --model torchvision.models:resnet18
    --input 1,3,64,64[/bold]
    """
    model, inputs = build_model(job), make_input(job)
    if channel is None:
        return _coupled(ChannelGraph(model, inputs), layer)
    masks = read_masks(job)
    source = ChannelGraph(model, inputs) if masks is None else ModelSpeedup(model, inputs, masks)
    found = source.why(layer, channel)
    data = {
        "layer": layer,
        "channel": channel,
        "free": found.free,
        "state": found.state,
        "reason": found.reason,
        "path": found.path,
        "with_it": [str(member) for member in found.members],
    }
    return Answer(data, (str(found),))


def _coupled(graph: ChannelGraph, layer: str) -> Answer:
    coupled = graph.coupled(layer)
    readers = [n for n in graph.coupled(layer, readers=True) if n not in coupled]
    facts = next((each for each in layer_facts(graph) if each.layer == layer), None)
    data: dict[str, Any] = {"layer": layer, "coupled": coupled, "readers": readers}
    text = [
        f"go together with {layer}: {', '.join(coupled) or 'no others'}",
        f"lose inputs with it: {', '.join(readers) or 'none'}",
    ]
    if facts is not None:
        data |= {"units": facts.units, "free": facts.free, "held": facts.held}
        text.append(f"can go: {facts.free} of {facts.units} units")
        text += [f"stay: {count}: it {reason}" for reason, count in facts.held.items()]
    return Answer(data, tuple(text))


@command("evaluator")
def sensitivity(
    job: Job,
    sparsities: Annotated[
        str, typer.Option(help="To try of each layer, separated by commas.")
    ] = ",".join(map(str, SPARSITIES)),
    output: Annotated[
        Path | None, typer.Option(help="Write the curves: .csv (as NNI), .json, .png or .svg.")
    ] = None,
) -> Answer:
    """Measure how good the model is without a part of each layer alone.

    The evaluator's eval_fn says how good. Without a config_list, all layers.

    Example: [bold]compress sensitivity prune.yaml --sparsities 0.25,0.5 --output curves.csv[/bold]
    """
    if output is not None:
        check_writable(output)
        if output.suffix not in CURVES:
            raise ConfigError(
                f"--output: got {output}; expected a file {', '.join(CURVES[:-1])} or {CURVES[-1]}"
            )
        if output.suffix not in TABLES:
            require_matplotlib()
    model, evaluator = build_model(job), make_evaluator(job)
    if evaluator is None:
        raise ConfigError(
            "evaluator: it is missing, and says how good a model is; pass --evaluator "
            "module:function, which returns compress.Evaluator(eval_fn=accuracy)"
        )
    selected: list[dict[str, Any]] = job.config_list or [{"op_types": ["Conv2d", "Linear"]}]
    with user_code(f"evaluator: {job.evaluator}"):
        found = compress.sensitivity_analysis(
            model,
            selected,
            evaluator,
            _fractions(sparsities),
            dummy_input=make_input(job),
            seed=job.seed,
        )
    if output is not None:
        (found.export if output.suffix in TABLES else found.plot)(output)
    data = {"dense": found.dense, "performances": found.performances, "layers": found.layers}
    return Answer(data, (str(found),), () if output is None else (str(output),))


def _fractions(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--sparsities: got {text!r}; expected numbers, as 0.25,0.5") from None


@command("pruner", "sparsity", "exclude", "evaluator", "train", "masks", "small")
def prune(job: Job) -> Answer:
    """Choose what goes, and write the masks, or the small model, or both.

    The file, all but the model optional:

        model: {factory: torchvision.models:resnet18, kwargs: {num_classes: 10}}
        weights: dense.safetensors
        dummy_input: \\[1, 3, 64, 64]
        config_list:
          - {sparsity: 0.5, op_types: \\[default]}
          - {exclude: true, op_names: \\[fc]}
        pruner: {name: L2FilterPruner, arguments: {mode: dependency_aware}}
        evaluator: data:evaluator
        train: data:fine_tune
        masks: masks.safetensors
        small: small.safetensors

    Example: [bold]compress prune prune.yaml[/bold]

    Example: [bold]compress prune --model torchvision.models:resnet18 --input 1,3,64,64 --sparsity
    0.5 --exclude fc --masks masks.safetensors --small small.safetensors[/bold]
    """
    if job.masks is None and job.small is None:
        raise ConfigError("nothing to write: pass --masks FILE, --small FILE, or both")
    _check_files(job.masks, job.small)
    function = None if job.train is None else resolve("train", job.train)
    model, evaluator = build_model(job), make_evaluator(job)
    pruner = make_pruner(job, model, evaluator)
    with user_code(f"pruner: {job.pruner.name}"):
        model, masks = pruner.compress()
    if job.masks is not None:
        masks.save(job.masks)
    data: dict[str, Any] = {
        "pruner": job.pruner.name,
        "sparsity": masks.sparsity,
        "sparsity_per_layer": masks.sparsity_per_layer,
    }
    text: list[Any] = [str(masks)]
    if job.small is not None:
        if applied_masks(model):  # a pruner with speedup=True has shrunk it already
            report = _shrink(job, model)
            data["report"] = asdict(report)
            text = [str(report)]
        if function is not None:
            with user_code(f"train: {job.train}"):
                function(model)
        provenance = job.model_dump(mode="json", include={"pruner", "config_list", "seed"})
        compress.save(model, job.small, provenance=provenance)
    return Answer(data, tuple(text), _paths(job.masks, job.small))


@command("masks", "small", "train")
def speedup(job: Job) -> Answer:
    """Cut the masked model down to a small one that computes the same, and write it.

    Example: [bold]compress speedup prune.yaml --masks masks.safetensors --small
    small.safetensors[/bold]
    """
    if job.small is None:
        raise ConfigError("nothing to write: pass --small FILE")
    _check_files(None, job.small)
    function = None if job.train is None else resolve("train", job.train)
    model, masks = build_model(job), read_masks(job)
    if masks is None and not applied_masks(model):
        raise ConfigError("masks: there are none; pass --masks FILE, as compress prune writes it")
    if masks is not None:
        masks.apply(model)
    report = _shrink(job, model)
    if function is not None:
        with user_code(f"train: {job.train}"):
            function(model)
    compress.save(model, job.small)
    return Answer({"report": asdict(report)}, (str(report),), (job.small,))


def _shrink(job: Job, model: nn.Module) -> Report:
    """Shrink a masked model in place."""
    shrinking = ModelSpeedup(model, make_input(job), **job.speedup.model_dump())
    shrinking.speedup_model()
    return shrinking.report


def _check_files(masks: str | None, small: str | None) -> None:
    """Raise where the job's files could not be written, before the work is done."""
    if masks is not None:
        check_writable(masks)
    if small is not None:
        check_writable(file_of(small))


def _paths(*paths: str | None) -> tuple[str, ...]:
    return tuple(path for path in paths if path is not None)


@command("small", "evaluator")
def bench(
    job: Job,
    repeats: Annotated[int, typer.Option(min=1, help="Forward passes that are timed.")] = 50,
    warmup: Annotated[int, typer.Option(min=0, help="Passes before, not counted.")] = 10,
) -> Answer:
    """Measure the dense model, and the small one beside it: size, mult-adds, latency.

    With an evaluator that has an eval_fn, how good they are, too.

    Example: [bold]compress bench prune.yaml --small small.safetensors[/bold]
    """
    models = {"dense": build_model(job).eval()}
    if job.small is not None:
        models["small"] = load_small(job).eval()
    inputs = make_input(job)
    with user_code("model: running it"):
        measured = compare(models, inputs, warmup=warmup, repeats=repeats)
    scores = _scores(job, models)
    shown = {name: f"{score:.4g}" for name, score in scores.items()}
    extra = {"score": shown} if scores else None
    data = {n: {**_numbers(each), "score": scores.get(n)} for n, each in measured.items()}
    return Answer(data, (str(table(measured, extra)),))


def _scores(job: Job, models: dict[str, nn.Module]) -> dict[str, float]:
    evaluator = make_evaluator(job)
    if evaluator is None or evaluator.eval_fn is None:
        return {}
    with user_code(f"evaluator: {job.evaluator}"):
        return {name: float(evaluator.eval_fn(model)) for name, model in models.items()}


def _numbers(each: Measurement) -> dict[str, Any]:
    return {
        "parameters": each.summary.parameters_total,
        "mult_adds": each.summary.mult_adds,
        "flops": each.summary.flops,
        "size_mb": each.size_mb,
        **_times(each.latency),
    }


def _times(time: Latency) -> dict[str, Any]:
    return {
        "latency_ms": {"median": time.median_ms, "p10": time.p10_ms, "p90": time.p90_ms},
        "measured": {
            "repeats": time.repeats,
            "batch": time.batch,
            "device": time.device,
            "threads": time.threads,
        },
    }


@command("small", "evaluator")
def export(
    job: Job,
    to: Annotated[Path, typer.Option(help="The file to write: .onnx, or .pt2 for torch.export.")],
    int8: Annotated[
        bool, typer.Option("--int8", help="ONNX with int8 weights; near the model, not equal.")
    ] = False,
    calibration: Annotated[
        int, typer.Option(min=1, help="With --int8: batches of the evaluator's to calibrate by.")
    ] = 16,
    fixed_batch: Annotated[
        bool, typer.Option("--fixed-batch", help="For the batch size of the input only.")
    ] = False,
    runtimes: Annotated[
        str, typer.Option(help='To time beside eager mode and the file; by commas, "" for none.')
    ] = ",".join(RUNTIMES),
    repeats: Annotated[int, typer.Option(min=1, help="Forward passes that are timed.")] = 50,
    warmup: Annotated[int, typer.Option(min=0, help="Passes before, not counted.")] = 10,
) -> Answer:
    """Write the small model, or without one the model, for another runtime, and time it.

    The file is run and held against the model before it is there. With --int8, activations are int8
    too where the job has an evaluator with data to calibrate by.

    Example: [bold]compress export prune.yaml --small small.safetensors --to small.onnx[/bold]
    """
    names = [name for name in runtimes.split(",") if name]
    check_options(to, int8, names)
    check_writable(to)
    if job.small is None and job.masks is not None:
        raise ConfigError("small: it is missing, and there are masks; run compress speedup first")
    model = (build_model(job) if job.small is None else load_small(job)).eval()
    inputs = make_input(job)
    if int8:
        evaluator = make_evaluator(job)
        with user_code(f"evaluator: {job.evaluator}"):
            data = calibration_inputs(model, evaluator, inputs, calibration)
        written = write_int8(model, inputs, to, not fixed_batch, data)
    else:
        written = write_float(model, inputs, to, not fixed_batch)
    timed = compare_runtimes(
        model,
        inputs,
        runtimes=[name for name in names if name != written.runtime_name],
        others={written.runtime_name: written.runtime},
        warmup=warmup,
        repeats=repeats,
    )
    line = (
        f"{written.format}, {written.megabytes:.2f} MB, largest difference to the model "
        f"{written.relative_error:.1e} of the output's scale"
    )
    found = {
        "format": written.format,
        "megabytes": written.megabytes,
        "relative_error": written.relative_error,
        "absolute_error": written.absolute_error,
        "runtimes": _runtimes(timed),
        "missing": timed.missing,
    }
    return Answer(found, (line, str(timed)), tuple(map(str, written.files)))


def _runtimes(timed: RuntimeComparison) -> dict[str, Any]:
    return {
        name: {**_times(each), "relative_error": timed.differences[name]}
        for name, each in timed.latencies.items()
    }


@command("masks", "small", "evaluator")
def report(
    job: Job,
    html: Annotated[Path | None, typer.Option(help="Write a page: one .html file.")] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Write a .md file, and its pictures beside it.")
    ] = None,
    sensitivity: Annotated[
        Path | None, typer.Option(help="For the page: what compress sensitivity wrote.")
    ] = None,
    search: Annotated[
        Path | None, typer.Option(help="For the page: a search's experiment_data_dir.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="For the page: passes that are timed.")] = 50,
    warmup: Annotated[int, typer.Option(min=0, help="Passes before, not counted.")] = 10,
) -> Answer:
    """Show what a speedup would remove under the masks and why the rest stays; change nothing.

    Without --masks, what the file of the small model says of itself: what was cut, and how. A page
    has all of it with pictures: the models measured side by side, each layer, the channel graph.

    Example: [bold]compress report prune.yaml --masks masks.safetensors --html page.html[/bold]
    """
    pages = [path for path in (html, markdown) if path is not None]
    check_pages(html, markdown)
    for path in pages:
        check_writable(path)
    if not pages and (sensitivity or search):
        raise ConfigError("--sensitivity and --search are for a page; pass --html or --markdown")
    answer = told(job)
    if not pages:
        return answer
    made = page(job, partial(_scores, job), sensitivity, search, warmup, repeats)
    wrote = tuple(str(file) for path in pages for file in made.write(path))
    return replace(answer, wrote=wrote)
