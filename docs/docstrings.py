"""A Griffe extension that converts formulas, roles and arguments in docstrings to Markdown for the API reference."""

from __future__ import annotations

import itertools
import re
import textwrap
from typing import Any

import griffe
from latex2mathml.converter import convert

FORMULA = re.compile(r"^\.\. math::[ ]*(?P<line>.*)\n(?P<block>(?:\n|[ ]+\S.*\n?)*)", re.MULTILINE)
# "a, b, c: text": the names may continue on the next line, and the text on indented lines.
TOGETHER = re.compile(
    r"^(?P<indent>[ ]+)(?P<names>\w+(?:,\s+\w+)+):(?P<text>.*(?:\n(?P=indent)[ ]+\S.*)*)", re.MULTILINE
)
ROLE = re.compile(r":(?:attr|class|func|meth|mod):`~?([\w.]+)`")
INLINE = re.compile(r"(?P<space>\s*):math:`(?P<formula>[^`]+)`")
# A heading as in PyTorch's docstrings, which Griffe would take for the title of an admonition.
SHAPE = re.compile(r"^Shape:\n(?P<text>(?:[ ]+\S.*\n?)+)", re.MULTILINE)


def _mathml(match: re.Match[str]) -> str:
    formulas = re.split(r"\n\s*\n", match["line"] + "\n" + match["block"])
    return "".join(f"\n{convert(' '.join(f.split()), display='block')}\n\n" for f in formulas if f.strip())


def _inline_mathml(match: re.Match[str]) -> str:
    formula = convert(" ".join(match["formula"].split()), display="inline")
    return f" {formula}" if match["space"] else formula  # at the start of a line, it would be an HTML block


def _shape(match: re.Match[str]) -> str:
    return f"**Shape:**\n\n{textwrap.dedent(match['text'])}"


def _each(match: re.Match[str]) -> str:
    names = re.split(r",\s+", match["names"])
    return "\n".join(f"{match['indent']}{name}:{match['text']}" for name in names)


def markdown(docstring: str) -> str:
    """Convert a docstring to Markdown, with formulas in MathML, which browsers render, and one entry per argument."""
    text = INLINE.sub(_inline_mathml, FORMULA.sub(_mathml, docstring + "\n"))
    text = re.sub(r"::$", ":", SHAPE.sub(_shape, text), flags=re.MULTILINE).rstrip()
    return ROLE.sub(r"`\1`", TOGETHER.sub(_each, text))


def comment_above(attribute: griffe.Attribute) -> str:
    """Return the comment on a class field: the lines directly above it and the comment at the end of its own line."""
    lines, number = attribute.lines_collection[attribute.filepath], (attribute.lineno or 1) - 1
    above = list(itertools.takewhile(lambda line: line.strip().startswith("# "), reversed(lines[:number])))
    behind = lines[number].partition("  # ")[2]
    return " ".join(line.strip().removeprefix("# ") for line in (*reversed(above), behind)).strip()


class Docstrings(griffe.Extension):
    """Applies :func:`markdown` to every docstring, and uses the comments on class fields as their docstrings."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        is_field = isinstance(obj, griffe.Attribute) and obj.parent is not None and obj.parent.is_class
        # A comment above an assignment in __init__, which has no annotation, explains code.
        if is_field and obj.annotation is not None and obj.docstring is None and (comment := comment_above(obj)):
            obj.docstring = griffe.Docstring(comment, parent=obj)
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
