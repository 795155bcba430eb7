"""Files that are whole or not there: what a crash, a full disk or a reader in between never sees half of."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

__all__ = ['replacing', 'write_whole']


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``, whose file takes ``path``'s place at the end, and is removed after an error.

    Raises:
        OSError: The file can't be put there. What was there before still is.
    """
    # Always the same name, so that what a killed process left is overwritten and not kept beside the next.
    temporary = path.with_name(f'.{path.name}.part')
    try:
        yield temporary
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write ``content``, text in UTF-8, to ``path``."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
