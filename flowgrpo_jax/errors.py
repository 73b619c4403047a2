"""The error a user sees: one line with the key, the bad value and the remedy."""


class UserError(ValueError):
    """Wrong input; the commands print its single line and exit non-zero."""
