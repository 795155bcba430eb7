"""How the iteration over a loader ends, also if it never does."""

import resource
import threading

from timm_npu_irv2.errors import UserError

LIMIT = 600  # seconds, for a machine that is busy


def error_of(loader) -> list[str]:
    """Return the text of the UserError that ends an iteration; [] if it has not ended in time."""
    found: list[str] = []

    def iterate() -> None:
        try:
            list(loader)
            found.append('no error')
        except UserError as error:
            found.append(str(error))

    thread = threading.Thread(target=iterate, daemon=True)
    thread.start()
    thread.join(LIMIT)
    return found


def error_without_shared_memory(loader) -> list[str]:
    """Return what ``error_of`` does, where a batch cannot be sent. A limit on the size of files stands for that."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        return error_of(loader)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
