"""MkDocs' hooks: pages and pictures from outside docs/, the links to them, and generated parts."""

from __future__ import annotations

from typing import Any

# These lie beside this file, where MkDocs finds them.
import generated
import links
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of OUTSIDE, and the pictures outside docs/ that pages show."""
    for place, origin in links.OUTSIDE.items():
        text = (links.ROOT / origin).read_text(encoding="utf-8")
        files.append(File.generated(config, place, content=text))
    targets = {
        links.target(file.src_uri, path)
        for file in files.documentation_pages()
        for path, _ in links.links_of(file.content_string)
    }
    for picture in sorted(targets):
        if picture.endswith((".png", ".svg")) and not picture.startswith("docs/"):
            files.append(File.generated(config, picture, abs_src_path=str(links.ROOT / picture)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put in the generated parts, and make links to files of the repository links of the site."""
    return links.on_site(generated.with_parts(markdown), page.file.src_uri)


def on_page_content(html: str, **_: Any) -> str:
    """Turn formulas into MathML."""
    return generated.with_mathml(html)
