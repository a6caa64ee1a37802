"""For mkdocstrings: docstrings as its parser wants them, which finds a section only below an empty line."""

import re

import griffe

SECTION = re.compile(r"\n+(?=(?:Args|Attributes|Returns|Raises|Source):)")


class Sections(griffe.Extension):
    """Sets every section of a docstring apart."""

    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring:
            text = SECTION.sub("\n\n", obj.docstring.value)
            obj.docstring.value = re.sub(r"^Source:", "**Source:**", text, flags=re.MULTILINE)
