"""The one exception of the local stack; never a traceback for what a person can put right."""


class LocalError(Exception):
    """Something a person can put right; its text is a sentence that says what to do."""
