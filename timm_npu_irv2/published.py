"""Files on the Hugging Face Hub: whether they can be had now, and its errors in one line.

A script asks this before it loads torch, so this module does not import torch.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from huggingface_hub import constants as hub_constants
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .errors import UserError, one_line

__all__ = ['CONFIG', 'REPOSITORIES', 'WEIGHTS', 'check_available', 'find_outage', 'split_revision',
           'translate_hub_errors']

WEIGHTS, CONFIG = 'model.safetensors', 'config.json'
# Repositories with weights of this network by their tags, the default first.
REPOSITORIES = {tag: f'timm/inception_resnet_v2.{tag}' for tag in ('tf_in1k', 'tf_ens_adv_in1k')}


def check_available(repo: str, revision: str | None, name: str) -> None:
    """Raise the error of huggingface_hub if a file can be had neither from the hub nor from the cache.

    Args:
        repo: 'owner/name'.
        revision: Branch, tag or commit; None for main.
        name: Name of the file.
    """
    unreachable = find_outage(repo, revision, name)
    if unreachable is not None and not isinstance(try_to_load_from_cache(repo, name, revision=revision), str):
        raise unreachable


def find_outage(repo: str, revision: str | None, name: str) -> Exception | None:
    """Return why the hub cannot be asked about a file, so that only the cache can have it; None if it can be.

    It asks once, for 4 seconds unless HF_HUB_ETAG_TIMEOUT is set. hf_hub_download alone takes half a minute to find out
    that there is no network.
    """
    timeout = hub_constants.HF_HUB_ETAG_TIMEOUT if 'HF_HUB_ETAG_TIMEOUT' in os.environ else 4
    try:
        get_hf_file_metadata(hf_hub_url(repo, name, revision=revision), timeout=timeout)
    except (HTTPError, OSError) as error:  # OfflineModeIsEnabled is one of the latter
        if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
            raise
        return error
    return None


@contextlib.contextmanager
def translate_hub_errors(what: str) -> Iterator[None]:
    """Turn an error of huggingface_hub into a UserError of one line.

    Args:
        what: The name of the repository or model, for the message.
    """
    try:
        yield
    except UserError:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError, EntryNotFoundError) as error:
        raise UserError(f'{what}: {_reason(error)}') from error


def _reason(error: BaseException) -> str:
    where = hub_constants.ENDPOINT
    chain, behind = [error], error.__cause__ or error.__context__
    while behind is not None and behind not in chain:
        chain.append(behind)
        behind = behind.__cause__ or behind.__context__
    status = next((each.response.status_code for each in chain if isinstance(each, HfHubHTTPError)), None)
    kinds: list[tuple[Any, str]] = [
        (GatedRepoError, 'its owner must grant access first: request it on its page, then run `hf auth login`.'),
        (RepositoryNotFoundError, f'{where} has no such repository, or it is private: check the name, and log in with '
                                  '`hf auth login` or HF_TOKEN.'),
        (RevisionNotFoundError, 'it has no such branch, tag or commit: check the revision.'),
        (OfflineModeIsEnabled, 'it is not in the cache, and HF_HUB_OFFLINE is set: unset it, or download it first.'),
    ]
    for kind, text in kinds:
        if any(isinstance(each, kind) for each in chain):
            return text
    if status in (401, 403):
        return (f'{where} refuses ({status}): log in with `hf auth login`, or set HF_TOKEN to a token that may '
                'read and write here.')
    if isinstance(chain[0], EntryNotFoundError) and not isinstance(chain[0], LocalEntryNotFoundError):
        return (f'it has no {WEIGHTS} or no {CONFIG} in that revision; other formats are not read, since reading them '
                'can run code.')
    if status is not None:
        return f'{where} answered {status}: {one_line(chain[0])}'
    broken = next((each for each in chain if isinstance(each, HTTPError | LocalEntryNotFoundError)), None)
    if broken is not None:
        return (f'{where} cannot be reached, and it is not in the cache ({one_line(broken)}): check the network, '
                'set HF_ENDPOINT to a mirror, or load from a folder with local-dir:.')
    advice = (f': check the cache {hub_constants.HF_HUB_CACHE}, or choose another with HF_HOME.'
              if isinstance(chain[0], OSError | UnicodeError) else '')
    return one_line(chain[0]) + advice


def split_revision(repo: str) -> tuple[str, str | None]:
    """Split 'owner/name@revision'; the revision may be missing."""
    name, _, revision = repo.partition('@')
    return name, revision or None
