"""Hooks of mkdocs: what the pages of the site show besides the text of ``docs/``.

Links in ``docs/`` are those of the repository, so that they work where its files are read. The site
also has the measured results (``benchmarks/results``), the change log and the contributor's guide;
links to them, and to tutorials, are rewritten. A line of a page that holds nothing but one of these
directives is replaced:

- ``{{ names rnnkeys.objectives }}``: the documentation of every public name of a package or module;
- ``{{ all names }}``: a table of all public names;
- ``{{ include benchmarks/results/r2d2.md }}``: another page's text, without its title;
- ``{{ commands tutorials/r2d2.py }}``: the commands in a program's docstring;
- ``{{ code tutorials/r2d2.py }}``: a program, in a block that opens by a click.

Notebooks become pages, with the outputs that they were saved with. Equations become MathML.
"""

from __future__ import annotations

import ast
import json
import posixpath
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

from scripts.docs_docstrings import to_markdown
from scripts.public_names import PublicName, public_modules, public_names

ROOT = Path(__file__).resolve().parent.parent
# Files of the repository outside docs/ that the site shows, under the same path.
SHOWN = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "benchmarks/results/**/*.md",
    "benchmarks/results/**/*.png",
    "tutorials/**/*.py",
    "tutorials/**/*.yaml",
)

_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?(?=\))")
_DIRECTIVE = re.compile(r"^\{\{ (\w+) (\S+) \}\}$", re.MULTILINE)
_MATH = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add files of the repository, and a page for each notebook."""
    for pattern in SHOWN:
        for path in sorted(ROOT.glob(pattern)):
            files.append(_repository_file(path.relative_to(ROOT).as_posix(), config))
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        text = notebook_to_markdown(json.loads(notebook.content_string), notebook.name)
        files.append(
            File.generated(config, notebook.src_uri[: -len(".ipynb")] + ".md", content=text)
        )
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace directives, and make links of the repository those of the site."""
    path = to_repository(page.file.src_uri)
    markdown = _DIRECTIVE.sub(lambda match: _expand(match[1], match[2], path), markdown)
    return move_links(markdown, lambda target: to_site(target, path), page.file.src_uri)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Write equations as MathML, which browsers draw without a script."""
    return _MATH.sub(_to_mathml, html)


def to_repository(uri: str) -> str:
    """Return the path in the repository of a page of the site.

    Examples:
        >>> to_repository("agents.md"), to_repository("benchmarks/results/r2d2.md")
        ('docs/agents.md', 'benchmarks/results/r2d2.md')
    """
    return uri if (ROOT / uri).is_file() else f"docs/{uri}"


def to_site(target: str, path: str) -> str:
    """Return where the site has the file that a page of the repository links to.

    Args:
        target: the link, relative to the page.
        path: path of the page in the repository.

    Examples:
        >>> to_site("../tutorials/r2d2.py", "docs/agents.md")
        'tutorials/r2d2.md'
        >>> to_site("../first.ipynb", "docs/tutorials/start.md")
        'first.md'
        >>> to_site("docs/backends.md", "README.md")
        'backends.md'
    """
    full = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
    stem, ending = posixpath.splitext(full.removeprefix("docs/"))
    is_own = stem == posixpath.splitext(path.removeprefix("docs/"))[0]
    has_page = ending == ".ipynb" or (ROOT / "docs" / f"{stem}.md").is_file()
    return stem + (".md" if has_page and not is_own else ending)


def move_links(markdown: str, locate: Callable[[str], str], uri: str) -> str:
    """Rewrite the relative links of a text.

    Args:
        markdown: the text.
        locate: maps a link's target to a path of the site.
        uri: path of the page that shows the text, which the new links are relative to.

    Examples:
        >>> move_links("[a](x.md#b), [c](https://d.org)", lambda t: "docs/" + t, "docs/y/z.md")
        '[a](../x.md#b), [c](https://d.org)'
    """
    folder = posixpath.dirname(uri)

    def move(match: re.Match[str]) -> str:
        return posixpath.relpath(locate(match[1]), folder or ".") + (match[2] or "")

    return _LINK.sub(move, markdown)


def notebook_to_markdown(notebook: dict[str, Any], name: str) -> str:
    """Return the cells of a notebook, with their saved outputs, as Markdown.

    Args:
        notebook: the parsed file, of format 4.
        name: the file's name without its ending; the page links to the file.

    Examples:
        >>> cells = [{"cell_type": "markdown", "source": ["# Title"]}]
        >>> print(notebook_to_markdown({"cells": cells}, "first"))
        # Title
        <BLANKLINE>
        This page is a notebook: [first.ipynb](first.ipynb).
    """
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else _fence("python", source))
        parts += [_show_output(output) for output in cell.get("outputs", [])]
    parts.insert(1, f"This page is a notebook: [{name}.ipynb]({name}.ipynb).")
    return "\n\n".join(parts)


def read_commands(program: str, folder: str) -> str:
    r"""Return the indented lines ``python ...`` of a program's docstring, as run from outside.

    Examples:
        >>> read_commands(r"'Learn.\n\n    python a.py --seed 1\n\nIt is one file.'", "tutorials")
        'python tutorials/a.py --seed 1'
    """
    docstring = ast.get_docstring(ast.parse(program)) or ""
    commands = re.findall(r"^ +python (.*)$", docstring, re.MULTILINE)
    return "\n".join(f"python {folder}/{command}" for command in commands)


def _repository_file(uri: str, config: MkDocsConfig) -> File:
    level = InclusionLevel.NOT_IN_NAV
    return File(uri, str(ROOT), config.site_dir, config.use_directory_urls, inclusion=level)


def _expand(directive: str, argument: str, path: str) -> str:
    if directive == "names":
        return "\n\n".join(_show_name(one) for one in public_names(argument))
    if directive == "all":
        return _table_of_names()
    text = (ROOT / argument).read_text()
    if directive == "commands":
        return _fence("bash", read_commands(text, posixpath.dirname(argument)))
    if directive == "code":
        return f'??? example "{argument}"\n\n' + _indent(_fence("python", text))
    if directive == "include":
        text = text.split("\n", 1)[1]
        folder = posixpath.dirname(argument)
        return move_links(text, lambda target: posixpath.join(folder, target), path)
    raise ValueError(f"{path} has an unknown directive: {directive!r}.")


def _show_name(one: PublicName) -> str:
    return f"::: {one.defined}\n    options: {{heading: {one.path}, toc_label: {one.name}}}"


def _table_of_names() -> str:
    lines = ["| name | |", "|---|---|"]
    for module in public_modules():
        lines += [_row(one) for one in public_names(module)]
    return "\n".join(lines)


def _row(one: PublicName) -> str:
    summary = to_markdown(one.summary, "`{}`".format).replace("|", "\\|")
    return f"| [`{one.path}`][{one.defined}] | {summary} |"


def _show_output(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        return f"![result](data:image/png;base64,{''.join(data['image/png']).strip()})"
    return _fence("text", "".join(output.get("text", data.get("text/plain", []))))


def _fence(language: str, text: str) -> str:
    return f"````{language}\n{text.rstrip()}\n````"


def _indent(text: str) -> str:
    return re.sub("^(?=.)", "    ", text, flags=re.MULTILINE)


def _to_mathml(match: re.Match[str]) -> str:
    display = "block" if match[1] == "div" else "inline"
    mathml = convert(unescape(match[2]), display=display)
    return f'<div class="equation">{mathml}</div>' if match[1] == "div" else mathml
