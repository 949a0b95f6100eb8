"""What can go wrong, each kind with its exit code (docs/guide.md lists them)."""

import re

_GRANTING = re.compile(
    r"""((?<![A-Za-z])(?:upload_id|(?:[a-z]+_)?token|(?:x-goog-)?signature|x-goog-credential|api_?key|(?<=[?&])key)
        (?:=|%3D) | authorization['"]?\s*[:=]\s*['"]?(?:bearer|basic)?\s* | bearer\s+)
        ['"]?[^\s'"&,;)>]+ | \b(?:ya29\.|hf_)[\w.-]{8,}""",
    re.IGNORECASE | re.VERBOSE,
)


def redacted(text: str) -> str:
    """`text` without what grants access to whoever reads it: an upload's session, tokens, signatures."""
    return _GRANTING.sub(lambda match: f"{match[1] or ''}...", text)


def shown(text: str, *, lines: bool = False) -> str:
    """`text` as a terminal may show it, wherever it comes from: nothing in it moves a cursor, hides or colours
    something, or grants access. lines: whether it may be several."""
    kept = "\n" if lines else ""
    return "".join(
        each if each.isprintable() or each in kept else each.encode("unicode_escape").decode()
        for each in redacted(text)
    )


def first_line(error: BaseException) -> str:
    """Of what somebody else's error says; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class ToolkitError(Exception):
    """A failure that the user can act on: the message says what, where and what to do next."""

    exit_code = 1

    def __str__(self) -> str:
        """Other people's words are part of many messages, and messages go to logs, records and pages."""
        return shown(super().__str__(), lines=True)


class UsageError(ToolkitError):
    """A flag or argument is wrong."""

    exit_code = 2


class BadDataError(ToolkitError):
    """More bad input records than the user allows, or input that cannot be read at all."""

    exit_code = 65


RETRY_BUDGET_S = 300.0
"""Seconds that one operation of a bucket may go on failing, before that is a StorageError."""


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


class CancelledError(TerminatedError):
    """Ctrl-C; as SIGTERM otherwise."""

    exit_code = 130
