"""Writes the report on one or several runs: Markdown, one self-contained HTML file, and the plots."""

import base64
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from markdown_it import MarkdownIt

from rocketkv.errors import InputError
from rocketkv.eval.report.runs import read_runs

HTML = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ display: block; overflow-x: auto; border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .2rem .7rem; border-bottom: 1px solid #ddd; white-space: nowrap; }}
img {{ max-width: 100%; }}
</style>
{body}
</html>
"""


def write_report(folders: Sequence[Path], out: Path) -> list[Path]:
    """Write `report.md`, `report.html` and the pictures.

    Args:
        folders: as `rocketkv eval run --out` fills them, one at least, all of one model.
        out: a folder, made if need be.

    Returns:
        The files written, `report.md` and `report.html` first.

    Raises:
        InputError: a folder holds no run, runs are of different models or hold the same answer twice, `out` cannot be
            written, or matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise InputError("a report needs matplotlib, which is not installed; run `pip install rocketkv[eval]`.")
    from rocketkv.eval.report.sections import Pictures, sections  # this import needs matplotlib

    runs = read_runs(folders)
    try:
        out.mkdir(parents=True, exist_ok=True)
        pictures = Pictures(out)
        text = "\n\n".join(sections(runs, pictures)) + "\n"
        markdown, html = out / "report.md", out / "report.html"
        markdown.write_text(text, encoding="utf-8")
        html.write_text(_render(text, out), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{out} cannot be written ({error.strerror}); give another folder.") from None
    return [markdown, html, *pictures.paths]


def _render(text: str, folder: Path) -> str:
    """Return the Markdown as one HTML file with the pictures in it."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(text)
    for token in tokens:
        for child in token.children or ():
            if child.type == "image":
                picture = base64.b64encode((folder / str(child.attrs["src"])).read_bytes()).decode()
                child.attrs["src"] = f"data:image/svg+xml;base64,{picture}"
    body = parser.renderer.render(tokens, parser.options, {})
    return HTML.format(title="Evaluation", body=body)
