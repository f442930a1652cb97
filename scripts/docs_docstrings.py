"""Extension of griffe: turn the reStructuredText in docstrings into Markdown.

Roles (``:class:`Cell```) become links where their target is on the site, equations what the
Markdown extension ``arithmatex`` reads, and numbers of arXiv and pages of ``docs/`` links.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from functools import cache
from typing import Any

import griffe

from scripts.public_names import public_modules, public_names

_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|obj):`([^`]+)`")
_INLINE_MATH = re.compile(r":math:`([^`]+)`", re.DOTALL)
_MATH = re.compile(r"^( *)\.\. math::(.*(?:\n\1 +\S.*)*)", re.MULTILINE)
_PAGE = re.compile(r"``docs/([\w/]+)\.md``")
_ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")


class Docstrings(griffe.Extension):
    """Rewrite every docstring of a package once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Rewrite the docstrings of ``pkg`` and of all that it defines."""
        _rewrite(pkg)


def to_markdown(text: str, link: Callable[[str], str]) -> str:
    r"""Return a docstring with its roles and equations in Markdown.

    Args:
        text: the docstring.
        link: maps the name in a role to the Markdown that takes its place.

    Examples:
        >>> print(to_markdown(":class:`Cell`, :math:`a^2` (arXiv:1409.1259).", "`{}`".format))
        `Cell`, \(a^2\) ([arXiv:1409.1259](https://arxiv.org/abs/1409.1259)).
        >>> print(to_markdown("One.\n\n.. math::\n    a = b\n\nTwo.", "`{}`".format))
        One.
        <BLANKLINE>
        \[a = b\]
        <BLANKLINE>
        Two.
    """
    text = _MATH.sub(_display, text)
    text = _INLINE_MATH.sub(lambda match: rf"\({' '.join(match[1].split())}\)", text)
    text = _ROLE.sub(lambda match: link(match[1]), text)
    text = _PAGE.sub(r"[`docs/\1.md`](../\1.md)", text)  # relative to docs/reference
    return _ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def _rewrite(owner: griffe.Object) -> None:
    if owner.docstring:
        owner.docstring.value = to_markdown(owner.docstring.value, lambda name: _link(owner, name))
    for member in owner.members.values():
        if isinstance(member, griffe.Object):
            _rewrite(member)


def _link(owner: griffe.Object, name: str) -> str:
    """Return a link to a name as the docstring of ``owner`` writes it, or the name as code."""
    shown = name.removeprefix("~")
    first, _, rest = shown.partition(".")
    try:
        path = ".".join(filter(None, [owner.resolve(first), rest]))
    except griffe.NameResolutionError:
        return f"`{shown}`"
    return f"[`{shown}`][{path}]" if _is_shown(path) else f"`{shown}`"


def _is_shown(path: str) -> bool:
    """Return whether the site documents a definition, or the class that it is a member of."""
    return bool({path, path.rpartition(".")[0]} & _shown_paths())


@cache
def _shown_paths() -> frozenset[str]:
    return frozenset(one.defined for name in public_modules() for one in public_names(name))


def _display(match: re.Match[str]) -> str:
    equation = " ".join(textwrap.dedent(match[2]).split())
    return rf"{match[1]}\[{equation}\]"
