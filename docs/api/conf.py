"""Sphinx: one page for each module, from its docstrings.

python -m sphinx -W --keep-going docs/api docs/api/_build
"""

import sys
import typing
from pathlib import Path

from sphinx.ext.apidoc import main as apidoc

import bn_research

typing.GENERATING_DOCUMENTATION = True  # jaxtyping then gives Array its own name
_HERE = Path(__file__).parent
sys.path.insert(0, str(_HERE))  # docstrings.py

project = "bn_research"
author = "The bn_research authors"
version = release = bn_research.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "templates", "modules/bn_research.rst"]
default_role = "py:obj"  # `name` links to what has that name, and is code where nothing has
highlight_language = "none"  # listings are equations and commands
smartquotes = False  # "--" is that of a flag
suppress_warnings = ["ref.python"]  # a name that two modules have links to one of them

autodoc_default_options = {"members": True, "member-order": "bysource", "no-value": True}
autodoc_preserve_defaults = True
add_module_names = False
autodoc_typehints_format = "short"
napoleon_use_ivar = True
napoleon_attr_annotations = False  # the signature has the types
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = f"bn_research {release}"
html_copy_source = False


def setup(app):
    """Writes a page for each module, and reads docstrings as they are written."""
    from docstrings import is_foreign, read_docstring, read_signature

    app.connect("autodoc-process-docstring", read_docstring, priority=400)  # napoleon's has 500
    app.connect("autodoc-process-signature", read_signature)
    app.connect("autodoc-skip-member", is_foreign)
    templates, pages = f"--templatedir={_HERE / 'templates'}", f"--output-dir={_HERE / 'modules'}"
    package = str(Path(bn_research.__file__).parent)
    apidoc(["-q", "--force", "--remove-old", "--separate", "--no-toc", templates, pages, package])
