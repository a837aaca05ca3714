"""HTML that is escaped by construction: plain strings are text, only ``Html`` is markup."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

VOID = frozenset({"img", "input", "br", "wbr"})


class Html(str):
    """Markup; everything else is escaped when it is put into a tag."""


Child = str | None | Iterable["Child"]


def join(*children: Child) -> Html:
    """Concatenates children; None is skipped."""
    return Html("".join(_render(child) for child in children))


def tag(name: str, /, *children: Child, **attributes: object) -> Html:
    """One element. ``class_`` is class, ``data_sort`` data-sort; None and False leave an attribute out."""
    start = f"<{name}{''.join(_attribute(n, v) for n, v in attributes.items())}>"
    return Html(start if name in VOID else f"{start}{join(*children)}</{name}>")


def _attribute(name: str, value: object) -> str:
    if value is None or value is False:
        return ""
    name = name.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{escape(str(value))}"'


def _render(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, str):
        return child if isinstance(child, Html) else escape(child)
    return "".join(_render(c) for c in child)


def breakable(name: str) -> Html:
    """A dotted name that may wrap after each dot."""
    return Html("<wbr>".join(escape(part) for part in name.replace(".", ".\0").split("\0")))


def section(anchor: str, title: str, *children: Child) -> Html:
    return tag("section", tag("h2", title), *children, id=anchor)
