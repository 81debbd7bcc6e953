"""What MkDocs does beside its plugins: plots whose points answer to the pointer, and notebooks as pages."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

EXAMPLES = Path(__file__).parents[1] / "examples"
PLOT = re.compile(r'<img alt="([^"]*)" src="([^"]*plots/[^"]*\.svg)" ?/?>')


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add a page for each notebook of examples/, with the outputs that the notebook holds; nothing is executed."""
    for notebook in EXAMPLES.glob("*.ipynb"):
        text, resources = MarkdownExporter().from_filename(str(notebook), {"unique_key": notebook.stem})
        files.append(File.generated(config, f"notebooks/{notebook.stem}.md", content=text))
        for name, picture in resources["outputs"].items():
            files.append(File.generated(config, f"notebooks/{name}", content=picture))


def on_page_content(html: str, **_: object) -> str:
    """Show each plot as a document inside the page: a browser shows the titles of points there, but not of an image."""
    return PLOT.sub(r'<object type="image/svg+xml" data="\2" role="img" aria-label="\1"></object>', html)
