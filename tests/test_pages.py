"""Each sentence of a Markdown page begins a line; `make lint` holds the width of the lines."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/**/*.md")]
SECOND_SENTENCE = re.compile(r"(?<!e\.g)(?<!i\.e)(?<! al)[.!?][)\"*]* +[\"(*`]*[A-Z]")


def crowded_lines(page: str) -> list[str]:
    """Return the lines of paragraphs in which a second sentence begins; tables and code are no paragraphs."""
    tokens = MarkdownIt().enable("table").parse(page)
    paragraphs = [text.content for opening, text in pairwise(tokens) if opening.type == "paragraph_open"]
    return [line for paragraph in paragraphs for line in paragraph.split("\n") if SECOND_SENTENCE.search(line)]


def test_a_second_sentence_is_found() -> None:
    page = "A sentence, e.g. This.\nAnother.\n\n- **Third.** Fourth.\n\n| a. B |\n|---|\n| c. D |\n\n    code. Code"
    assert crowded_lines(page) == ["**Third.** Fourth."]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_line_has_one_sentence(page: Path) -> None:
    assert crowded_lines(page.read_text(encoding="utf-8")) == []
