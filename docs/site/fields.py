"""An extension of griffe, which reads the code for the API pages: `knob(default, help)` is a field with a docstring."""

from __future__ import annotations

import ast
from typing import Any

import griffe


class Knobs(griffe.Extension):
    """Give a setting its default as its value, and its help as its docstring."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Take apart a value that is a call of `knob`."""
        call = attr.value
        if isinstance(call, griffe.ExprCall) and call.canonical_path.endswith("knob"):
            default, help = call.arguments[:2]
            attr.value = default
            attr.docstring = griffe.Docstring(ast.literal_eval(str(help)), parent=attr)
