"""Names of local files."""

from urllib.parse import unquote


def plain_path(path: str) -> str:
    """The path that `file:///folder` means; anything else is taken as it is. `#` and `?` are part of names."""
    return unquote(path.removeprefix("file://")) if path.startswith("file:///") else path
