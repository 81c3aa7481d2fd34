"""Escaped HTML fragments and number formats; nothing else in the report builds a tag around a value."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape


class Markup(str):
    """Text that is HTML already; every other string is escaped."""

    __slots__ = ()


def text(value: object) -> Markup:
    """Escape a value, unless it is markup already."""
    return value if isinstance(value, Markup) else Markup(escape(str(value), quote=True))


def tag(name: str, *content: object, **attributes: object) -> Markup:
    """One element; a trailing underscore of an attribute's name is dropped (``class_``)."""
    pairs = "".join(f' {key.rstrip("_")}="{text(value)}"' for key, value in attributes.items())
    return Markup(f"<{name}{pairs}>{join(content)}</{name}>")


def join(parts: Iterable[object]) -> Markup:
    """Put fragments behind each other."""
    return Markup("".join(text(part) for part in parts))


def table(head: Sequence[object], rows: Iterable[Sequence[object]], numeric_from: int = 1) -> Markup:
    """A table that scrolls sideways on a narrow screen.

    Args:
        head: titles of the columns.
        rows: cells; a row shorter than the head is filled up.
        numeric_from: first column that is set flush right.

    Returns:
        The element.
    """

    def row(cells: Sequence[object], name: str) -> Markup:
        filled = [*cells, *[""] * (len(head) - len(cells))]
        return tag(
            "tr",
            *[tag(name, c, class_="n") if i >= numeric_from else tag(name, c) for i, c in enumerate(filled)],
        )

    body = tag("tbody", *[row(cells, "td") for cells in rows])
    return tag("div", tag("table", tag("thead", row(head, "th")), body), class_="scroll")


def details(title: str, content: object) -> Markup:
    """A part that is folded until it is clicked."""
    return tag("details", tag("summary", title), content)


def number(value: float | None, digits: int = 4) -> str:
    """A number with fixed decimals, a dash if it was not measured."""
    if value is None:
        return "-"
    return f"{value:,.{digits}f}" if math.isfinite(value) else "not finite"


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction in percent."""
    return "-" if value is None else number(100 * value, digits) + " %"


def size(value: float | None) -> str:
    """Bytes in binary units."""
    if value is None or not math.isfinite(value):
        return number(value)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:,.0f} B" if unit == "B" else f"{value:,.2f} {unit}"
        value /= 1024
    return f"{value:,.2f} TiB"


def duration(value: float | None) -> str:
    """Seconds in a unit that suits them."""
    if value is None or not math.isfinite(value):
        return number(value)
    if value < 1:
        return f"{1000 * value:,.2f} ms" if value < 0.1 else f"{1000 * value:,.0f} ms"
    return f"{value:,.2f} s" if value < 600 else f"{value / 60:,.1f} min"
