"""What can go wrong, each kind with its exit code (docs/guide.md lists them)."""


class ToolkitError(Exception):
    """A failure that the user can act on: the message says what, where and what to do next."""

    exit_code = 1


class UsageError(ToolkitError):
    """A flag or argument is wrong."""

    exit_code = 2


class BadDataError(ToolkitError):
    """More bad input records than the user allows, or input that cannot be read at all."""

    exit_code = 65


class StorageError(ToolkitError):
    """Storage cannot be reached or cannot take the data; a later start may succeed."""

    exit_code = 75


class DeviceError(ToolkitError):
    """A device is missing, busy or has failed; a later start may succeed."""

    exit_code = 75


class WriterConflictError(ToolkitError):
    """Another writer holds this worker id."""

    exit_code = 76


class ConfigError(ToolkitError):
    """Model, settings and stored state do not fit together."""

    exit_code = 78


class TerminatedError(ToolkitError):
    """SIGTERM arrived; everything durable is consistent and a later start resumes."""

    exit_code = 143
