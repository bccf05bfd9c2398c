"""Keeps orbax's threads off stderr, which a progress bar shares; failures come as exceptions."""

import functools
import logging
import re
import sys
from typing import Any

# The first of many reads or writes that fails is raised and ends orbax's event loop; the others
# find it closed, or are collected with nobody to tell.
_ABANDONED = re.compile(r"Event loop is closed|tensorstore", re.IGNORECASE)


@functools.cache
def quiet_orbax() -> None:
    """From now on drops orbax's log, and what its abandoned reads and writes complain of."""
    logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
    logging.getLogger("asyncio").addFilter(
        lambda record: not (record.exc_info and _ABANDONED.search(str(record.exc_info[1])))
    )
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if not _ABANDONED.search(str(unraisable.exc_value)):
            before(unraisable)

    sys.unraisablehook = hook
