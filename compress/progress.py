"""A progress bar for what takes longer than about two seconds, and only on a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

from rich.console import Console
from rich.errors import LiveError
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

_PATIENCE_S = 2.0


class Advance(Protocol):
    """To be called after each step.

    ``note`` is shown after the description. ``known`` is a step that has taken no time, as it was
    done before: it says nothing about the time that is left.
    """

    def __call__(self, note: str = "", known: bool = False) -> None: ...


@contextmanager
def progress_bar(
    description: str, total: int | None = None, shown: bool = True
) -> Iterator[Advance]:
    """Give a function to call after each step; the bar is on stderr and vanishes at the end.

    Args:
        description: what is going on, in front of the bar.
        total: number of steps, if that is known.
        shown: False is silence. Where stderr is no terminal there is silence in any case.
    """
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not (shown and console.is_interactive),
        speed_estimate_period=float("inf"),  # a step may take hours
    )
    task = bar.add_task(description, total=total)
    begin = bar.get_time()

    def advance(note: str = "", known: bool = False) -> None:
        bar.advance(task)
        if note:
            bar.update(task, description=f"{description}: {note}")
        if known:
            bar.reset(task, completed=int(bar.tasks[0].completed))
        if bar.get_time() - begin > _PATIENCE_S:
            with suppress(LiveError):  # older releases of rich show one bar at a time
                bar.start()  # a second call does nothing

    try:
        yield advance
    finally:
        bar.stop()
