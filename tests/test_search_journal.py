"""The journal of a search: nothing is lost, whatever happens to the file or to the process."""

from __future__ import annotations

import errno
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from search_jobs import CONFIG, evaluate, network
from torch import nn

from compress.errors import StateError
from compress.masks import applied_masks
from compress.search import SearchResult, SimulatedAnnealingPruner
from compress.search import journal as journals
from compress.search.journal import NAME, Journal

KEY = {"weights": "abc", "seed": 3}
ENTRIES = {str(number): {"performance": number / 3, "share": [0.5, None]} for number in range(4)}


def written(folder: Path) -> bytes:
    journal = Journal(folder, KEY)
    for name, entry in ENTRIES.items():
        journal.add(name, entry)
    journal.close()
    return (folder / NAME).read_bytes()


def entries(folder: Path) -> dict[str, Any]:
    journal = Journal(folder, KEY)
    found = {name: journal.get(name) for name in ENTRIES if journal.get(name) is not None}
    journal.close()
    return {
        name: {k: v for k, v in entry.items() if k != "id"}
        for name, entry in found.items()
        if entry is not None
    }


def test_what_is_written_is_read(tmp_path: Path) -> None:
    content = written(tmp_path / "new" / "folder")
    assert entries(tmp_path / "new" / "folder") == ENTRIES
    assert (tmp_path / "new" / "folder" / NAME).read_bytes() == content


def test_cut_off_at_any_byte_it_loses_the_torn_line_only(tmp_path: Path) -> None:
    content = written(tmp_path)
    for length in range(len(content)):
        (tmp_path / NAME).write_bytes(content[:length])
        whole = max(content[:length].count(b"\n") - 1, 0)
        assert entries(tmp_path) == dict(list(ENTRIES.items())[:whole])
        if length % 9:
            continue
        journal = Journal(tmp_path, KEY)  # and goes on with whole lines
        for name in list(ENTRIES)[whole:]:
            journal.add(name, ENTRIES[name])
        journal.close()
        assert (tmp_path / NAME).read_bytes() == content


@pytest.mark.parametrize("flip", [1, 32, 255])
def test_no_flipped_byte_is_believed(tmp_path: Path, flip: int) -> None:
    content = written(tmp_path)
    lines = content.split(b"\n")
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= flip
        (tmp_path / NAME).write_bytes(bytes(damaged))
        line = content[:place].count(b"\n")
        if place == len(content) - 1:  # the last line's end, as if torn
            assert entries(tmp_path) == dict(list(ENTRIES.items())[:-1])
            continue
        told = "first line is damaged" if line == 0 else rf"line {line + 1} is damaged; remove this"
        with pytest.raises(StateError, match=told):
            Journal(tmp_path, KEY)
        assert (tmp_path / NAME).read_bytes() == bytes(damaged)
        if line and flip != 255:  # what the message says helps
            others = [each for number, each in enumerate(lines) if number != line]
            (tmp_path / NAME).write_bytes(b"\n".join(others))
            assert len(entries(tmp_path)) == len(ENTRIES) - 1


@pytest.mark.parametrize(
    "content", [b"my notes", b"my notes\n", b"{}\n", b"[]\n", b"\n", b"\0" * 9]
)
def test_a_file_that_is_no_journal_is_left_alone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / NAME).write_bytes(content)
    with pytest.raises(StateError, match=r"no journal of a search.*pass another"):
        Journal(tmp_path, KEY)
    assert (tmp_path / NAME).read_bytes() == content


def test_another_search(tmp_path: Path) -> None:
    content = written(tmp_path)
    with pytest.raises(StateError, match=r"another search \(seed: 3, now 4\)"):
        Journal(tmp_path, KEY | {"seed": 4})
    assert (tmp_path / NAME).read_bytes() == content


def test_of_many_arguments_the_one_that_differs_is_told(tmp_path: Path) -> None:
    arguments = {"evaluator": "score" * 20, "metric": None, "candidates": 1}
    Journal(tmp_path, KEY | {"arguments": arguments}).close()
    with pytest.raises(StateError, match=r"another search \(candidates: 1, now 2\)"):
        Journal(tmp_path, KEY | {"arguments": arguments | {"candidates": 2}})


def test_a_folder_that_cannot_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match=r"experiment_data_dir: .*file"):
        Journal(tmp_path / "file", KEY)
    with pytest.raises(StateError, match="experiment_data_dir: "):
        Journal("/proc/no/such", KEY)
    (tmp_path / NAME).mkdir()
    with pytest.raises(StateError, match="experiment_data_dir: "):
        Journal(tmp_path, KEY)


def test_a_full_disk(tmp_path: Path, monkeypatch: Any) -> None:
    content = written(tmp_path)
    journal = Journal(tmp_path, KEY)
    write = os.write

    def half(file: int, data: bytes) -> int:
        if len(data) > 20:
            return write(file, data[:20])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(journals.os, "write", half)
    with pytest.raises(StateError, match=r"cannot be written.*No space.*begin the same search"):
        journal.add("4", {"performance": 1.0})
    monkeypatch.undo()
    assert (tmp_path / NAME).read_bytes() == content
    journal.add("4", {"performance": 1.0})
    journal.close()
    assert (tmp_path / NAME).read_bytes().startswith(content)


# -- two searches in one folder ------------------------------------------------------------


def test_a_folder_is_that_of_one_search_at_a_time(tmp_path: Path) -> None:
    journal = Journal(tmp_path, KEY)
    with pytest.raises(StateError, match="another search is running in this experiment_data_dir"):
        Journal(tmp_path, KEY)
    journal.add("0", ENTRIES["0"])
    journal.close()
    assert list(entries(tmp_path)) == ["0"]


def test_a_killed_search_leaves_no_lock_though_its_workers_live_on(tmp_path: Path) -> None:
    code = (
        "import os, sys, time, signal\n"
        "from compress.search.journal import Journal\n"
        f"journal = Journal({str(tmp_path)!r}, {KEY!r})\n"
        "worker = os.fork()\n"
        "if worker == 0:\n"
        "    time.sleep(30)\n"
        "    os._exit(0)\n"
        "print(worker, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    found = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert found.stdout is not None
    worker = int(found.stdout.readline())
    found.wait()
    try:
        Journal(tmp_path, KEY).close()
    finally:
        os.kill(worker, 9)
        found.stdout.close()


def test_forked_workers_do_not_take_the_lock_away(tmp_path: Path) -> None:
    journal = Journal(tmp_path, KEY)
    context = multiprocessing.get_context("fork")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        pool.submit(os.getpid).result()
    torch.set_num_threads(threads)
    with pytest.raises(StateError, match="another search is running"):
        Journal(tmp_path, KEY)
    journal.close()


# -- a search ------------------------------------------------------------------------------


def search(folder: Path, evaluator: Any = evaluate) -> SearchResult:
    pruner = SimulatedAnnealingPruner(
        network(), CONFIG, evaluator, cool_down_rate=0.5, experiment_data_dir=folder
    )
    pruner.compress()
    assert pruner.result is not None
    return pruner.result


def test_a_search_goes_on_where_its_journal_ends(tmp_path: Path, monkeypatch: Any) -> None:
    whole = search(tmp_path)
    history = (tmp_path / "search_history.csv").read_text()
    content = (tmp_path / NAME).read_bytes()
    lines = content.splitlines(keepends=True)
    for kept in (0, 1, 3, len(lines)):
        torn = lines[kept][:9] if kept < len(lines) else b""
        (tmp_path / NAME).write_bytes(b"".join(lines[:kept]) + torn)
        asked: list[nn.Module] = []

        def counted(model: nn.Module, asked: list[nn.Module] = asked) -> float:
            asked.append(model)
            return evaluate(model)

        counted.__module__, counted.__qualname__ = evaluate.__module__, evaluate.__qualname__
        found = search(tmp_path, counted)
        assert [t.performance for t in found.trials] == [t.performance for t in whole.trials]
        # The dense model is always measured, as its input is seen by that.
        assert len(asked) == 1 + len(whole.trials) - max(kept - 2, 0)
    assert (tmp_path / "search_history.csv").read_text() == history  # the times are the journal's


def test_results_that_cannot_be_written_leave_the_model_alone(tmp_path: Path) -> None:
    (tmp_path / "search_history.csv").mkdir()
    model = network()
    pruner = SimulatedAnnealingPruner(
        model, CONFIG, evaluate, cool_down_rate=0.5, experiment_data_dir=tmp_path
    )
    with pytest.raises(StateError, match=r"results cannot be written.*begin the same search again"):
        pruner.compress()
    assert not applied_masks(model)
    (tmp_path / "search_history.csv").rmdir()
    assert pruner.compress()[1]


@pytest.mark.slow
def test_killed_at_random_moments_a_search_ends_as_a_whole_one(tmp_path: Path) -> None:
    script = Path(__file__).with_name("kill_search.py")
    command = [sys.executable, str(script), str(tmp_path), "15"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "killed 15 times" in done.stdout
