"""How every command runs: its options become a job, its answer is printed, its errors are told.

A command is a function of a `Job` and of its own options that returns an `Answer`; it prints
nothing. The options that say what the job is are the same for all and are listed here once.
"""

from __future__ import annotations

import inspect
import json
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import rich.box
import typer
import yaml
from rich.console import Console, RenderableType
from rich.table import Table

from compress.cli.job import Job, parse_job, read_file
from compress.errors import CompressError, ConfigError

_Text = str | None
_Command = TypeVar("_Command", bound=Callable[..., "Answer"])


@dataclass(frozen=True)
class Answer:
    """What a command found: ``data`` for --json, ``text`` for people; ``wrote`` are its files."""

    data: Mapping[str, Any]
    text: tuple[RenderableType, ...] = ()
    wrote: tuple[str, ...] = ()


def _every(
    config: Annotated[
        Path | None, typer.Argument(help="A YAML or JSON file that says all of the below.")
    ] = None,
    model: Annotated[
        _Text, typer.Option(help="What makes the model: package.module:function.")
    ] = None,
    model_args: Annotated[
        _Text, typer.Option(help='Its keyword arguments, as "num_classes: 10, width: 8" (YAML).')
    ] = None,
    weights: Annotated[
        _Text, typer.Option(help="safetensors, a torch file of tensors, or of compress.save.")
    ] = None,
    input: Annotated[
        list[str] | None,
        typer.Option(
            help="[NAME=]SIZES[:DTYPE[:BELOW]], as 1,3,224,224 or ids=1,16:int64:1000; "
            "once for each argument."
        ),
    ] = None,
    device: Annotated[_Text, typer.Option(help="Where the model runs.", show_default="cpu")] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Of the model's first weights and the input.", show_default="0"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error was raised.")] = False,
) -> None:
    """The options of all commands."""


def _some(
    masks: Annotated[_Text, typer.Option(help="File of masks (.pt: as NNI wrote it).")] = None,
    small: Annotated[_Text, typer.Option(help="File of the small model (safetensors).")] = None,
    evaluator: Annotated[
        _Text, typer.Option(help="module:function that returns a compress.Evaluator.")
    ] = None,
    train: Annotated[
        _Text, typer.Option(help="module:function that trains the small model it is given.")
    ] = None,
    pruner: Annotated[_Text, typer.Option(help="Its class.", show_default="L1FilterPruner")] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Of each layer, in the place of a config_list.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="With --sparsity: a layer to leave out.")
    ] = None,
) -> None:
    """The options of a job that only some commands use."""


def registrar(app: typer.Typer) -> Callable[..., Callable[[_Command], _Command]]:
    """A decorator that makes a function a command of ``app``, with these options of `_some`."""

    def command(*options: str) -> Callable[[_Command], _Command]:
        def register(function: _Command) -> _Command:
            app.command(help=unwrapped(function))(_with_options(function, options))
            return function

        return register

    return command


def unwrapped(function: Callable[..., Any]) -> str:
    """A docstring as help: its paragraphs on a line each, what is indented as it is."""
    paragraphs = (inspect.getdoc(function) or "").split("\n\n")
    return "\n\n".join(p if p.startswith("  ") else " ".join(p.split()) for p in paragraphs)


def _with_options(function: Callable[..., Answer], options: tuple[str, ...]) -> Callable[..., None]:
    """The function that typer is given: its signature has all options, listed once each."""
    own = _parameters(function)[1:]
    every, some = _parameters(_every), {p.name: p for p in _parameters(_some)}
    parameters = [*own, every[0], *every[1:-2], *(some[name] for name in options), *every[-2:]]

    def run(**given: Any) -> None:
        own_values = {p.name: given.pop(p.name) for p in own}
        as_json, debug = given.pop("as_json"), given.pop("debug")
        if all(given.get(name) is None for name in ("config", "model", "small")):
            raise typer.BadParameter("give a CONFIG file, or --model and --input")
        try:
            # What the user's own code prints must not get between the lines of the answer.
            with redirect_stdout(sys.stderr), warnings.catch_warnings():
                warnings.showwarning = lambda message, *_, **__: _told(f"warning: {message}")
                answer = function(_job(given), **own_values)
        except (CompressError, OSError) as error:  # such as a file that cannot be written
            if debug:
                raise
            _told(f"error: {error}")
            raise typer.Exit(1) from None
        _print(answer, as_json)

    run.__name__ = function.__name__
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [p.replace(kind=p.KEYWORD_ONLY) for p in parameters]
    )
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    hints = get_type_hints(function, include_extras=True)
    signature = inspect.signature(function)
    return [p.replace(annotation=hints[p.name]) for p in signature.parameters.values()]


def _job(given: dict[str, Any]) -> Job:
    """The job of a file and of the options, which go before what the file says."""
    config: Path | None = given.pop("config")
    raw = {} if config is None else read_file(config)
    arguments, sparsity = given.pop("model_args"), given.pop("sparsity", None)
    inputs, exclude = given.pop("input"), given.pop("exclude", None)
    if given["model"] is not None or arguments is not None:
        before = raw.get("model")
        same = before if isinstance(before, dict) else {"factory": before}
        model = given.pop("model")
        raw["model"] = same if model is None else {"factory": model}
        if arguments is not None:
            raw["model"] = {**raw["model"], "kwargs": _keywords(arguments)}
    if inputs:
        raw["dummy_input"] = _inputs(inputs)
    if sparsity is not None:
        raw["config_list"] = [{"sparsity": sparsity, "op_types": ["default"]}]
        raw["config_list"] += [{"exclude": True, "op_names": exclude}] if exclude else []
    elif exclude:
        raise ConfigError("--exclude goes with --sparsity; in a file, config_list excludes layers")
    raw |= {key: value for key, value in given.items() if value is not None}
    return parse_job("the command line" if config is None else str(config), raw)


def _keywords(text: str) -> Any:
    try:
        return yaml.safe_load(text if text.lstrip().startswith("{") else f"{{{text}}}")
    except yaml.YAMLError as error:
        raise ConfigError(
            f'--model-args: got {text!r}; expected keyword arguments, as "num_classes: 10"'
        ) from error


def _inputs(texts: list[str]) -> Any:
    """What ``dummy_input`` is in a file."""
    parsed = [_input(text) for text in texts]
    if len({name is None for name, _ in parsed}) > 1:
        raise ConfigError(
            f"--input: got {', '.join(texts)}; expected a NAME= for all of them, or for none"
        )
    if parsed[0][0] is not None:
        return dict(parsed)
    return [spec for _, spec in parsed]


def _input(text: str) -> tuple[str | None, dict[str, Any]]:
    name, equals, rest = text.rpartition("=")
    sizes, *more = rest.split(":")
    try:
        spec: dict[str, Any] = {"shape": [int(size) for size in sizes.split(",")]}
        if len(more) > 1:
            spec["high"] = int(more[1])
        if len(more) > 2:
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"--input: got {text!r}; expected [NAME=]SIZES[:DTYPE[:BELOW]], such as 1,3,224,224 or "
            "ids=1,16:int64:1000"
        ) from None
    if more:
        spec["dtype"] = more[0]
    return (name if equals else None), spec


# -- what is printed -----------------------------------------------------------------------


def grid(columns: tuple[str, ...], rows: list[tuple[object, ...]]) -> Table:
    """A table: numbers to the right, text folded where it is too long."""
    table = Table(box=rich.box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        right = any(isinstance(row[index], int) for row in rows)
        table.add_column(column, justify="right" if right else "left", overflow="fold",
                         no_wrap=right)  # fmt: skip
    for row in rows:
        table.add_row(*(f"{x:,}" if isinstance(x, int) else str(x) for x in row))
    return table


def _print(answer: Answer, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps({**answer.data, "wrote": answer.wrote}, indent=2) + "\n")
    else:
        # In a pipe there is no width to fit: the text must not be folded at 80 columns.
        console = Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False)
        for part in answer.text:
            console.print(part, soft_wrap=isinstance(part, str))
    for path in answer.wrote:
        _told(f"wrote {path}")


def _told(text: str) -> None:
    """A line for people only: on stderr, so that it is in nobody's data."""
    sys.stderr.write(f"{text}\n")
