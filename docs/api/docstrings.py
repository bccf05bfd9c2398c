"""Reads docstrings and signatures as they are written.

The docstrings are Google style with `code` and indented listings, and without the rest of
reStructuredText: a bar or a star is that sign, as in |x| and *args, and what is indented below a
blank line is an equation or a listing.
"""

import inspect
import re
import sys
from typing import Any

from numpy.typing import ArrayLike, DTypeLike
from sphinx.util.typing import stringify_annotation

_SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields):\s*$")
_CODE = re.compile(r"(``.*?``|:\w+:`[^`]*`|`[^`]*`)")
_FIELD = re.compile(r"Alias for field number \d+")
_FLAX_FIELDS = re.compile(r", parent: [^()]*, name: str \| None = None(?=\)$)")  # of every module
_NAMED_OBJECT = re.compile(r"= <(?:class|function) '?([\w.]+)'?>")
_OBJECT = re.compile(r"= <.*?>(?=, [\w*]|\)$)")
_NAMES = {
    stringify_annotation(ArrayLike, "smart"): "ArrayLike",
    stringify_annotation(DTypeLike, "smart"): "DTypeLike",
}


def read_docstring(app, what, name: str, obj, options, lines: list[str]) -> None:
    """Of autodoc-process-docstring, before napoleon's handler: rewrites the lines in place."""
    if lines and _FIELD.fullmatch(lines[0]):
        lines[:] = _comment_of_field(name)
    result: list[str] = []
    in_listing = in_section = False
    for line in lines:
        in_section = in_section or bool(_SECTION.match(line))
        if line and not line.startswith("    "):
            in_listing = False
        elif line and not in_section and not in_listing and (not result or not result[-1]):
            in_listing = True
            result += ["::", ""]
        result.append(line if in_listing else _escaped(line))
    lines[:] = result


def _escaped(line: str) -> str:
    """The line with its bars and stars as they are, but for those in code."""
    parts = _CODE.split(line)
    parts[::2] = [re.sub(r"(?<!\\)([*|])", r"\\\1", part) for part in parts[::2]]
    return "".join(parts)


def _comment_of_field(name: str) -> list[str]:
    """The comment beside a NamedTuple's field: Python gives fields no docstring."""
    module, class_name, field = name.rsplit(".", 2)
    source = inspect.getsource(getattr(sys.modules[module], class_name))
    line = re.search(rf"^    {field}: .*$", source, re.MULTILINE)
    comments = line.group().split("# ")[1:] if line else []
    return [comment.strip() for comment in comments if not comment.startswith("type:")]


def read_signature(app, what, name: str, obj, options, signature, result) -> tuple[Any, Any]:
    """Of autodoc-process-signature: jaxtyping's and NumPy's names as the source has them."""
    return _short(signature), _short(result)


def _short(text: str | None) -> str | None:
    if text is None:
        return None
    for long, short in _NAMES.items():
        text = text.replace(long, short)
    return _OBJECT.sub("= ...", _NAMED_OBJECT.sub(r"= \1", _FLAX_FIELDS.sub("", text)))


def is_foreign(app, what, name: str, obj, skip: bool, options) -> bool | None:
    """Of autodoc-skip-member: leaves out other libraries' functions, as a field's default."""
    module = getattr(obj, "__module__", None) or ""
    return True if callable(obj) and not module.startswith("bn_research") else None
