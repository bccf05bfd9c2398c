"""Silence for the builds that take seconds: no progress bar, no chatter of tfds."""

import contextlib
import io
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside it tfds prints nothing and logs errors alone; outside, everything is as it was.

    tfds prints its start and end on stdout, draws progress bars (on stderr, as a widget in a
    notebook) and warns through absl, for one that a configuration is not among its own. stderr is
    not redirected: absl's first message gives the root logger a handler of the stderr it finds,
    and the caller's own logging would go into our sink for good. The redirection of stdout is
    process-wide while it lasts.
    """
    # Imported here: it pulls in all of tfds, which callers that only read DATASETS do not need.
    from tensorflow_datasets.core.utils import tqdm_utils

    bars_shown = getattr(tqdm_utils, "_active", True)  # tfds has a setter and no getter
    logger = logging.getLogger("absl")

    def is_error(record: logging.LogRecord) -> bool:  # one for each block: blocks may be nested
        return record.levelno >= logging.ERROR

    tqdm_utils.display_progress_bar(False)
    logger.addFilter(is_error)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.removeFilter(is_error)
        tqdm_utils.display_progress_bar(bars_shown)
