"""The two errors a user can meet. Each message is one line: what, where, what to do."""


class SnapGenError(Exception):
    """Something failed: a bad file, a missing download, a full disk (exit code 1)."""


class UsageError(SnapGenError):
    """The request itself cannot be met: a bad size, an unknown variant (exit code 2)."""
