"""For mkdocstrings: docstrings as its parser wants them, which finds a section only below an empty line.

A product, as n*i, is no emphasis.
"""

import re

import griffe

SECTION = re.compile(r"\n+(?=(?:Args|Attributes|Returns|Raises|Source):)")


PRODUCT = re.compile(r"(?<=\w)\*(?=\w)")
CODE = re.compile(r"(`[^`]*`|^ {4,}\S.*$)", re.MULTILINE)  # `quoted`, or lines of it


class Sections(griffe.Extension):
    """Sets every section of a docstring apart."""

    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring:
            text = SECTION.sub("\n\n", obj.docstring.value)
            text = re.sub(r"^Source:", "**Source:**", text, flags=re.MULTILINE)
            obj.docstring.value = with_products(text)


def with_products(text: str) -> str:
    """The text, with the asterisks of its products escaped, but for those in code."""
    return "".join(part if k % 2 else PRODUCT.sub(r"\*", part) for k, part in enumerate(CODE.split(text)))
