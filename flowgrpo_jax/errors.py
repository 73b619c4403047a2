"""The error a user sees: one line with the key, the bad value and the remedy."""


class UserError(ValueError):
    """Wrong input; the commands print its single line and exit non-zero.

    `shown` stands above the line: the traceback of a user's own code, if that raised.
    """

    shown: str = ""


def shown_above(error: BaseException | None) -> str:
    """What stands above the line of this error, or of those that it came from."""
    passed: list[BaseException] = []
    while isinstance(error, UserError) and error not in passed:
        if error.shown:
            return error.shown
        passed.append(error)
        error = error.__cause__
    return ""
