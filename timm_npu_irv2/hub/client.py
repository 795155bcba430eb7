"""Files to and from the Hugging Face Hub: upload, download, and its errors in one line."""

import hashlib
import os
from pathlib import Path

from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
)
from huggingface_hub.errors import EntryNotFoundError

from ..errors import UserError
from ..published import CONFIG, WEIGHTS, find_outage, translate_hub_errors
from ..serialization import open_regular
from . import card

__all__ = ['CARD', 'CURVES', 'OPTIONAL', 'REQUIRED', 'check_folder', 'download', 'prepare', 'push']

CARD, CURVES = 'README.md', 'curves.png'
REQUIRED, OPTIONAL = (CONFIG, WEIGHTS), (CARD, CURVES)


def prepare(repo: str, *, private: bool = False, revision: str | None = None) -> str:
    """Create ``repo`` unless it exists, and check that it can be written to, before work that ends in :func:`push`.

    Returns:
        The repository's full name: the hub puts the owner of the token before a bare one.

    Raises:
        UserError: There is no network, no token, or no permission.
    """
    api = HfApi(library_name='timm_npu_irv2')
    with translate_hub_errors(repo):
        # None leaves the visibility of new repositories to the hub, where an organisation may have set one.
        repo = api.create_repo(repo, private=private or None, exist_ok=True).repo_id
        if revision:
            api.create_branch(repo, branch=revision, exist_ok=True)
    return repo


def push(
        folder: str | os.PathLike,
        repo: str,
        *,
        private: bool = False,
        revision: str | None = None,
        message: str = 'Add Inception-ResNet-v2',
) -> str:
    """Upload what :func:`.export` wrote into a folder as one commit, and nothing else that is there.

    Args:
        folder: The folder.
        repo: 'owner/name'; created unless it exists.
        private: Make a new repository private.
        revision: The branch to commit to, created unless it exists; 'main' by default.
        message: The message of the commit.

    Returns:
        The address of the commit.

    Raises:
        UserError: A file is missing, the hub refuses (see :func:`prepare`), or the connection broke.
    """
    folder = Path(folder)
    check_folder(folder)
    repo = prepare(repo, private=private, revision=revision)
    model_id = f'hf-hub:{repo}' + (f'@{revision}' if revision and revision != 'main' else '')
    operations = [CommitOperationAdd(name, folder / name)
                  for name in (*REQUIRED, CURVES) if (folder / name).is_file()]
    if (folder / CARD).is_file():
        text = card.address((folder / CARD).read_text(encoding='utf-8'), model_id)
        operations.append(CommitOperationAdd(CARD, text.encode()))
    with translate_hub_errors(repo):
        done = HfApi(library_name='timm_npu_irv2').create_commit(
            repo, operations, commit_message=message, revision=revision)
    return done.commit_url


def download(repo: str, revision: str | None = None) -> Path:
    """Download a repository's files of one commit, check their hashes, and return their folder in the cache.

    Raises:
        UserError: No such repository, no permission, no network, or a damaged file.
    """
    with translate_hub_errors(repo):
        unreachable = find_outage(repo, revision, CONFIG)
        folder = Path()
        for name in (*REQUIRED, *OPTIONAL):  # the first one by its branch, which the cache remembers so
            try:
                path = Path(hf_hub_download(repo, name, revision=revision if name == CONFIG else folder.name,
                                            library_name='timm_npu_irv2', local_files_only=unreachable is not None))
            except EntryNotFoundError as error:
                if name in REQUIRED:
                    raise unreachable or error from None
                continue
            folder = path.parent
            _check_hash(path, repo, folder.name)
    return folder


def _check_hash(path: Path, repo: str, commit: str) -> None:
    """Compare a file of the cache with the hash that the hub gave for it; huggingface_hub compares sizes only."""
    blob = path.resolve()
    if path.is_symlink() and blob.parent != (path.parents[2] / 'blobs').resolve():
        raise UserError(f'{repo}: {path} in the cache is a link to another file, {blob}: remove the link.')
    expected = blob.name if path.is_symlink() else (  # the cache names its blobs by their hashes
        get_hf_file_metadata(hf_hub_url(repo, path.name, revision=commit)).etag)
    with open_regular(blob) as file:
        content = file.read()
    if len(expected or '') == 64:  # a file of Git LFS
        actual = hashlib.sha256(content).hexdigest()
    else:  # Git's hash of a blob
        actual = hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()
    if actual == expected:
        return
    advice = 'It was removed from the cache. Try again; if it fails again, the file on the hub is damaged.'
    try:
        path.unlink()
        blob.unlink(missing_ok=True)
    except OSError as error:
        advice = f'It cannot be removed from the cache ({error.strerror}): remove {path}.'
    raise UserError(f'{repo}: {path.name} is damaged: its hash is {actual[:12]}…, not {str(expected)[:12]}…. {advice}')


def check_folder(folder: Path) -> None:
    """Raise UserError unless the folder has the files of an exported model."""
    missing = [name for name in REQUIRED if not (folder / name).is_file()]
    if missing:
        raise UserError(f'{folder} is not an exported model: missing {", ".join(missing)}. '
                        '`timm-npu-irv2 hub export CHECKPOINT FOLDER` writes one.')
