"""The one exception of this wing."""


class DataError(ValueError):
    """A data set cannot be had: one line that says what is wrong and what to do about it."""

    def __init__(self, message: object) -> None:
        """Keep `message` on one line, whatever the error of the system it quotes."""
        super().__init__(" ".join(str(message).split()))
