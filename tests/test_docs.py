"""Every block of the README and of the pages in docs/ runs, and prints what it shows."""

import importlib
import inspect
import pkgutil
import pydoc
import re

import pages
import pytest
import torch

import compress
from compress import ModelSpeedup

REFERENCE = pages.ROOT / "docs/reference"


def name(page):
    return str(page.relative_to(pages.ROOT))


@pytest.mark.parametrize(
    "page", [page for page in pages.PAGES if any(pages.blocks(page, "python", "sh"))], ids=name
)
@pytest.mark.filterwarnings("ignore:::(transformers|lightning|torch.distributed)")
def test_a_page_runs_and_prints_what_it_shows(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # pages write modules
    torch.manual_seed(0)
    pages.run(page)


def test_a_page_that_shows_something_else_fails(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    code = '```python\nprint("left: 12 of 30, 1.3e-07")\n```\n\n'
    for language, shown, right in [
        ("output", "left: 12 of 30, 9.9e-01", True),
        ("output", "left: 12 of …", True),
        ("output", "left: 13 of 30, 1.3e-07", False),
        ("text", "left: 13 of 50, 1.3e-07", True),
        ("text", "gone: 12 of 30", False),
    ]:
        page.write_text(f"{code}```{language}\n{shown}\n```\n", encoding="utf-8")
        if right:
            pages.run(page)
        else:
            with pytest.raises(AssertionError, match="but this was printed"):
                pages.run(page)


def test_every_option_of_a_speedup_is_in_the_table_with_its_default():
    text = (pages.ROOT / "docs/howto/speedup.md").read_text(encoding="utf-8")
    for option in list(inspect.signature(ModelSpeedup).parameters.values())[3:]:
        default = f'"{option.default}"' if isinstance(option.default, str) else option.default
        assert f"| `{option.name}={default}` |" in text


def test_every_public_name_is_in_the_reference():
    shown = re.findall(
        r"^\.\. (?:auto)?(?:class|function|data|module):: (\S+)$",
        "\n".join(page.read_text(encoding="utf-8") for page in REFERENCE.glob("*.rst")),
        flags=re.M,
    )
    assert len(shown) == len(set(shown))
    documented = {id(pydoc.locate(name)) for name in shown}  # under any of its names
    names = []
    for package in [compress, *public_packages()]:
        names += [f"{package.__name__}.{name}" for name in getattr(package, "__all__", ())]
    assert len(names) > 100
    assert [name for name in names if id(pydoc.locate(name)) not in documented] == []
    of_compress = [f"compress.{name}" for name in compress.__all__]
    assert [name for name in of_compress if name not in shown] == []


def public_packages():
    for found in pkgutil.iter_modules(compress.__path__):
        if not found.name.startswith("_"):
            yield importlib.import_module(f"compress.{found.name}")


def test_every_call_that_users_of_other_tools_are_told_is_run():
    """The right columns of the tables: every call is in a block of code that runs."""
    code = squeezed(
        "\n".join(block.text for page in pages.PAGES for block in pages.blocks(page, "python"))
    )
    calls = []
    for page in (pages.ROOT / "docs/coming_from").glob("*.md"):
        for row in re.findall(r"^\| .* \| (.*) \|$", page.read_text(encoding="utf-8"), flags=re.M):
            calls += [call for call in re.findall(r"`([^`]+)`", row) if "(" in call]
    assert len(calls) > 60
    missing = [
        call for call in calls if not all(part in code for part in squeezed(call).split("…"))
    ]
    assert missing == []


def test_the_accuracies_are_those_of_the_results():
    text = (pages.ROOT / "docs/howto/choose_a_pruner.md").read_text(encoding="utf-8")
    results = (pages.ROOT / "benchmarks/results/accuracy.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^|]+ \|(.* ± .*)\|$", text, flags=re.M)
    accuracies = [accuracy.strip() for row in rows for accuracy in row.split("|")]
    assert len(accuracies) == 30
    assert [accuracy for accuracy in accuracies if f"| {accuracy} |" not in results] == []


def test_links_of_the_readme_work_on_the_package_index():
    text = (pages.ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert all(link.startswith("https://") for link in links)


def squeezed(text):
    return "".join(text.split())
