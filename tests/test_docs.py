"""Every block of the README and of the pages in docs/ runs, and prints what it shows."""

import inspect

import pages
import pytest
import torch

from compress import ModelSpeedup


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
