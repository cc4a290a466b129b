"""Errors that a user can cause or must act on, each with the exit code of its kind.

Every message names the item, what was found, what was expected, and the fix.
"""


class PdnError(Exception):
    """Ends a program with one message, without a traceback; the base of all errors of that kind.

    Args:
        code: short stable tag, e.g. ``"CKPT-HASH"``; printed as ``pdn[E-CKPT-HASH]``.
        message: one message: where, what was found, what was expected, and the fix.
    """

    exit_code = 70

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code

    def __str__(self) -> str:
        return f"pdn[E-{self.code}] {self.args[0]}"

    def __reduce__(self):
        return type(self), (self.code, self.args[0])


class DataError(PdnError):
    """Tells that data or a tokenizer is missing, damaged, or not what the run was made for."""

    exit_code = 65


class DataStorageError(DataError):
    """Tells that reading or writing data failed: disk full, not writable, a source that stalls."""

    exit_code = 74


class NumericError(PdnError):
    """Tells that losses or gradients stayed non-finite, or that replicas diverged."""

    exit_code = 70


class LockedError(PdnError):
    """Tells that another process holds the run directory."""

    exit_code = 73


class StorageError(PdnError):
    """Tells that reading or writing failed: disk full, not writable, vanished, or too slow."""

    exit_code = 74


class Preempted(PdnError):
    """Tells that the run was asked to stop, has saved, and continues on the next launch."""

    exit_code = 75


class ConfigError(PdnError):
    """Tells that the configuration or the command line cannot be run as given."""

    exit_code = 78
