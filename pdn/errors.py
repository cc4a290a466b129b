"""Errors that a user can cause or must act on, each with the exit code of its kind.

Every message names the item, what was found, what was expected, and the fix.
"""


class PdnError(Exception):
    """Base of all errors reported without a traceback.

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
    """The data or the tokenizer is missing, damaged, or not what the run was made for."""

    exit_code = 65


class DataStorageError(DataError):
    """Reading or writing data failed: disk full, not writable, a source that fails or stalls."""

    exit_code = 74


class NumericError(PdnError):
    """Losses or gradients stayed non-finite, or replicas diverged."""

    exit_code = 70


class LockedError(PdnError):
    """Another process holds the run directory."""

    exit_code = 73


class StorageError(PdnError):
    """Reading or writing failed: disk full, not writable, vanished, or too slow."""

    exit_code = 74


class Preempted(PdnError):
    """The run was told to stop, has saved, and continues on the next launch."""

    exit_code = 75


class ConfigError(PdnError):
    """The configuration or the command line cannot be run as given."""

    exit_code = 78
