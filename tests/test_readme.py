"""Every Python block of the README runs, in order, as one session, and prints what it shows."""

import inspect
import re
from pathlib import Path

import torch

from compress import ModelSpeedup

README = Path(__file__).parents[1] / "README.md"


def blocks(language):
    """``(first line number, code)`` of each fenced block of a language."""
    text = README.read_text(encoding="utf-8")
    for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, flags=re.M | re.S):
        yield text.count("\n", 0, match.start(1)), match[1]


def words(text):
    """Text without spaces, and without what another machine or version prints otherwise."""
    return "".join(re.sub(r"\d\.\de[-+]\d\d|(?<=\.py:)\d+", "#", text).split())


def test_the_snippets_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # some save files
    torch.manual_seed(0)
    session = {}
    shown, snippets = list(blocks("output")), list(blocks("python"))
    for number, (line, code) in enumerate(snippets):
        # Blank lines before it, so that a traceback has the README's line numbers.
        exec(compile("\n" * line + code, str(README), "exec"), session)
        if number == 0:
            left = sum(parameter.numel() for parameter in session["small"].parameters())
            assert f"-> {left:,} parameters" in next(blocks("text"))[1]  # the output that is shown
        printed, end = words(capsys.readouterr().out), line + code.count("\n")
        for output in [text for start, text in shown if 0 < start - end <= 4]:
            rows = [words(row.rstrip("…")) for row in output.splitlines()]
            assert all(row in printed for row in rows), output
            shown = [each for each in shown if each[1] != output]
    assert not shown  # every output that is shown was held against a snippet
    image = torch.rand(1, 3, 32, 32)
    assert session["small"].eval()(image).shape == (1, 10)


def test_every_option_of_a_speedup_is_in_the_table_with_its_default():
    text = README.read_text(encoding="utf-8")
    for option in list(inspect.signature(ModelSpeedup).parameters.values())[3:]:
        default = f'"{option.default}"' if isinstance(option.default, str) else option.default
        assert f"| `{option.name}={default}` |" in text
