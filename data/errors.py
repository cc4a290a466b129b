"""Errors of the data pipeline that a user can cause or must act on.

Every message names the item (file, shard, offset), what was found, what was expected, and the fix.
`data` imports nothing of `pdn`, so the form of `pdn.errors` is repeated here.
"""


class DataError(Exception):
    """The data or the tokenizer is missing, damaged, or not what the run was made for.

    Args:
        code: short stable tag, e.g. ``"SHARD-HASH"``; printed as ``pdn[E-SHARD-HASH]``.
        message: one message: where, what was found, what was expected, and the fix.
    """

    exit_code = 65

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code

    def __str__(self) -> str:
        return f"pdn[E-{self.code}] {self.args[0]}"

    def __reduce__(self):
        return type(self), (self.code, self.args[0])


class DataStorageError(DataError):
    """Reading or writing failed: disk full, not writable, a source that fails or stalls."""

    exit_code = 74
