"""A progress bar for what takes longer than about two seconds, and only on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress

_PATIENCE_S = 2.0


@contextmanager
def progress_bar(
    description: str, total: int | None = None, shown: bool = True
) -> Iterator[Callable[[], None]]:
    """Give a function to call after each step; the bar is on stderr and vanishes at the end.

    Args:
        description: what is going on, in front of the bar.
        total: number of steps, if that is known.
        shown: False is silence. Where stderr is no terminal there is silence in any case.
    """
    console = Console(stderr=True)
    bar = Progress(console=console, transient=True, disable=not (shown and console.is_interactive))
    task = bar.add_task(description, total=total)
    begin = bar.get_time()

    def advance() -> None:
        bar.advance(task)
        if bar.get_time() - begin > _PATIENCE_S:
            bar.start()  # a second call does nothing

    try:
        yield advance
    finally:
        bar.stop()
