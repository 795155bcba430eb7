"""Published models: a checkpoint as a Hugging Face Hub repository in timm's format, pushed, pulled and loaded.

    python -m timm_npu_irv2.hub export CHECKPOINT FOLDER [--ema] [--for npu|timm] [--dtype float16]
    python -m timm_npu_irv2.hub push FOLDER OWNER/NAME [--private] [--revision BRANCH]
    python -m timm_npu_irv2.hub pull OWNER/NAME [FOLDER] [--revision REVISION]

A repository holds ``model.safetensors``, ``config.json``, a model card and, where the checkpoint came with one, a
picture of the training; nothing that has to be unpickled is written or read. HF_ENDPOINT, HF_HUB_OFFLINE, HF_HOME,
HF_TOKEN and the token of ``hf auth login`` mean what they mean to huggingface_hub.
"""

import argparse
import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub import constants as hub_constants
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
from timm.data import ImageNetInfo
from timm.models import get_pretrained_cfg
from timm.models._hub import load_model_config_from_path, save_config_for_hf
from torch import Tensor, nn

from . import card, weights
from .errors import UserError
from .files import replacing, write_whole

__all__ = ['create', 'create_model', 'explained', 'export', 'from_pretrained', 'main', 'prepare', 'pull', 'push']

_logger = logging.getLogger(__name__)

OURS = 'inception_resnet_v2_npu'
ARCHITECTURES = {'npu': OURS, 'timm': 'inception_resnet_v2'}
WEIGHTS, CONFIG, CARD, CURVES = 'model.safetensors', 'config.json', 'README.md', 'curves.png'
_REQUIRED, _OPTIONAL = (CONFIG, WEIGHTS), (CARD, CURVES)
_PREPROCESSING = ('img_size', 'input_size', 'mean', 'std', 'crop_pct', 'crop_mode', 'interpolation')


# ------------------------------------------------------------------------------------------------------- export


@dataclass
class _Checkpoint:
    """A file of weights and what it knows about itself; the latter is empty unless train.py, ours or timm's, wrote it.

    Attributes:
        state_dict: The weights, in any dialect.
        args: The options of the training.
        epoch: The last epoch it was trained in, from 0.
        class_to_idx: The names of the classes it was trained on.
        averaged: Whether the weights are the moving average.
        measured: Whether the figures in the run's report are those of these weights.
    """

    state_dict: dict[str, Tensor]
    args: dict[str, Any] = field(default_factory=dict)
    epoch: int | None = None
    class_to_idx: dict[str, int] | None = None
    averaged: bool = False
    measured: bool = True


def export(
        checkpoint: str | os.PathLike,
        folder: str | os.PathLike,
        *,
        target: str = 'npu',
        ema: bool = False,
        dtype: str = 'float32',
        class_names: str | os.PathLike | None = None,
        report: str | os.PathLike | None = None,
        license: str = 'apache-2.0',
        datasets: Sequence[str] = (),
        preprocessing: dict[str, Any] | None = None,
) -> Path:
    """Write a checkpoint as a folder that is a repository of the hub, for :func:`push` or ``local-dir:``.

    Args:
        checkpoint: A file of train.py's, timm's, Cadene's or the model zoo's; .pth or .safetensors.
        folder: Where to write; what else is there stays.
        target: 'npu' for this package's network, 'timm' for a repository that timm loads without this package.
        ema: Take the averaged weights.
        dtype: 'float32', 'float16' or 'bfloat16': what the weights are rounded to.
        class_names: A file with a name a line, or a folder of class folders; by default the checkpoint's.
        report: A report.json of train.py or the JSON of validate.py; by default the one beside the checkpoint.
        license: The hub's name of a license.
        datasets: The hub's names of the data sets trained on.
        preprocessing: timm's ``img_size``, ``mean``, ``std``, ``crop_pct``, ``interpolation`` where the checkpoint
            does not say, or is wrong.

    Returns:
        The folder.

    Raises:
        UserError: The file is not there, not a checkpoint, not of this network, has no averaged weights; the names
            are not as many as the logits; the folder cannot be written.
    """
    source, folder = Path(checkpoint), Path(folder)
    content = _read_checkpoint(source, ema)
    model = _build(content, target, source).to(getattr(torch, dtype))
    names = _read_names(Path(class_names)) if class_names else _names_in(content, model.num_classes)
    if names is not None and len(names) != model.num_classes:
        raise UserError(f'--class-names {class_names} has {len(names)} names, {source} has {model.num_classes} logits: '
                        'one name for each is needed.')
    figures = _figures(source, content, Path(report) if report else None)
    settings = {key: content.args.get(key) for key in _PREPROCESSING} | (preprocessing or {})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        weights.save_file(model.state_dict(), folder / WEIGHTS)
        _write_config(model, folder / CONFIG, names, license, {k: v for k, v in settings.items() if v is not None})
        curves = source.parent / CURVES
        if figures and curves.is_file():
            write_whole(folder / CURVES, curves.read_bytes())
        write_whole(folder / CARD, card.write(
            folder.name or folder.resolve().name, json.loads((folder / CONFIG).read_text()), target=target,
            license=license, datasets=datasets, recipe=content.args, figures=figures, averaged=content.averaged,
            dtype=dtype, curves=CURVES if (folder / CURVES).is_file() else None))
    except OSError as error:
        raise UserError(f'{folder} cannot be written: {error.strerror or error}.') from error
    return folder


def _read_checkpoint(path: Path, ema: bool | None) -> _Checkpoint:
    """A file with or without its averaged weights; with them if it has any for None."""
    state_dict = weights.load_file(path, use_ema=ema is not False)
    content: dict[str, Any] = {}
    if path.suffix != '.safetensors':
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm's own checkpoints hold one
            content = torch.load(path, map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(path))
    if 'state_dict' not in content:
        content = {}
    has_average = content.get('state_dict_ema') is not None
    if ema and not has_average:
        raise UserError(f'--ema: {path} holds no averaged weights; train.py --model-ema makes them.')
    if has_average and ema is False:
        _logger.warning(f'{path} also holds averaged weights, which were what was evaluated; --ema takes them.')
    args = content.get('args') or {}
    return _Checkpoint(
        state_dict, args if isinstance(args, dict) else vars(args), content.get('epoch'),
        (content.get('training') or {}).get('class_to_idx'), averaged=has_average and ema is not False,
        measured=not has_average or ema is not False)


def _build(content: _Checkpoint, target: str, source: Path) -> nn.Module:
    """The target's network with the checkpoint's weights, in as many classes and channels as they have."""
    state_dict = weights.convert(content.state_dict, to='timm')  # which our network translates as it loads
    arguments = {
        'num_classes': len(state_dict['classif.weight']) if 'classif.weight' in state_dict else 0,
        'in_chans': state_dict['conv2d_1a.conv.weight'].shape[1] if 'conv2d_1a.conv.weight' in state_dict else 3,
        'global_pool': content.args.get('gp'),
        **(content.args.get('model_kwargs') or {}),
    }
    try:
        model = timm.create_model(ARCHITECTURES[target], **arguments)
        model.load_state_dict(state_dict)
    except (RuntimeError, TypeError) as error:
        raise UserError(f'{source} does not fit {ARCHITECTURES[target]}: {_one_line(error)}') from error
    return model.eval()


def _names_in(content: _Checkpoint, num_classes: int) -> list[str] | None:
    """The names of the logits, as far as the training had classes for them: the zoo's network has one logit more."""
    if not content.class_to_idx:
        return None
    names = {index: name for name, index in content.class_to_idx.items()}
    return [names.get(index, f'unused_{index}') for index in range(num_classes)]


def _read_names(source: Path) -> list[str]:
    """The lines of a file, or the names of a folder's folders (of its train/ if it has one) as ImageFolder sorts."""
    try:
        if source.is_dir():
            root = source / 'train' if (source / 'train').is_dir() else source
            return sorted(path.name for path in root.iterdir() if path.is_dir())
        return [line.strip() for line in source.read_text(encoding='utf-8').splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'--class-names {source}: {_one_line(error)}') from error


def _write_config(
        model: nn.Module,
        path: Path,
        names: list[str] | None,
        license: str,
        data_config: dict[str, Any],
) -> None:
    """timm's config.json, whole."""
    config: dict[str, Any] = {'pretrained_cfg': {'tag': '', 'license': license, 'hf_hub_filename': WEIGHTS}}
    if names:
        config['label_names'] = names
        known = ImageNetInfo('imagenet-22k')
        if all(re.fullmatch(r'n\d{8}', name) for name in names):
            config['label_descriptions'] = {
                name: known.label_name_to_description(name) for name in names if name in known.label_descriptions()}
    with replacing(path) as temporary:
        save_config_for_hf(model, temporary, model_config=config, data_config=data_config)


def _figures(source: Path, content: _Checkpoint, report: Path | None) -> dict[str, Any]:
    """What report.json says about these very weights; nothing if it is about others.

    A report given by name is taken at its word. The one beside a checkpoint is about a whole run, whose best and last
    epochs it tells.
    """
    given, path = report is not None, report or source.parent / 'report.json'
    if not given and not (path.is_file() and content.epoch is not None):
        return {}
    try:
        figures = json.loads(path.read_text(encoding='utf-8'))
        if given:
            return {**figures, 'top1': float(figures['top1'])}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f'{path} is not a report with a top1: {_one_line(error)}') from error
    last = figures.get('last_epoch') or {}
    if content.epoch == last.get('epoch'):
        figures |= {key: last.get(f'eval_{key}') for key in ('top1', 'top5', 'loss')}
    elif content.epoch != figures.get('best_epoch'):
        figures |= {'top1': None, 'top5': None, 'loss': None}
    return figures if content.measured else {**figures, 'top1': None, 'top5': None, 'loss': None}


# ----------------------------------------------------------------------------------------------------- transfers


def prepare(repo: str, *, private: bool = False, revision: str | None = None) -> str:
    """Make sure that ``repo`` exists and can be written to; for the beginning of what ends in :func:`push`.

    Returns:
        The repository's full name: the hub puts the owner of the token before a bare one.

    Raises:
        UserError: There is no network, no token, or no permission.
    """
    api = HfApi(library_name='timm_npu_irv2')
    with explained(repo):
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
    """Upload a folder of :func:`export`'s as one commit; only the four files it writes.

    Args:
        folder: The folder.
        repo: 'owner/name'; it is made if it is not there.
        private: Make a new one private.
        revision: The branch to commit to, made if it is not there; 'main' by default.
        message: The commit's.

    Returns:
        The address of the commit.

    Raises:
        UserError: The folder is not complete, or one of :func:`prepare`'s reasons, or the connection broke.
    """
    folder = Path(folder)
    _check_folder(folder)
    repo = prepare(repo, private=private, revision=revision)
    model_id = f'hf-hub:{repo}' + (f'@{revision}' if revision and revision != 'main' else '')
    operations = [CommitOperationAdd(name, folder / name)
                  for name in (*_REQUIRED, CURVES) if (folder / name).is_file()]
    if (folder / CARD).is_file():
        text = card.address((folder / CARD).read_text(encoding='utf-8'), model_id)
        operations.append(CommitOperationAdd(CARD, text.encode()))
    with explained(repo):
        done = HfApi(library_name='timm_npu_irv2').create_commit(
            repo, operations, commit_message=message, revision=revision)
    return done.commit_url


def pull(repo: str, folder: str | os.PathLike | None = None, *, revision: str | None = None) -> Path:
    """Download a repository, check it, and put it into ``folder`` (by default one of its name, here).

    The files go through huggingface_hub's cache, so that a second pull needs no download, or no network at all.

    Returns:
        The folder.

    Raises:
        UserError: No such repository, no permission, no network; a file is not what its hash says; the weights are not
            those of this network, or not as its config says.
    """
    source = _download(repo, revision)
    folder = Path(folder or repo.rpartition('/')[2])
    _check_folder(source)
    from_pretrained(source)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (*_REQUIRED, *_OPTIONAL):
            if (source / name).is_file():
                with replacing(folder / name) as temporary:
                    shutil.copyfile(source / name, temporary)
    except OSError as error:
        raise UserError(f'{folder} cannot be written: {error.strerror or error}.') from error
    return folder


def _download(repo: str, revision: str | None = None) -> Path:
    """The folder in the cache with a repository's files, all of one commit, their hashes checked."""
    with explained(repo):
        unreachable = _unreachable(repo, revision, CONFIG)
        folder = Path()
        for name in (*_REQUIRED, *_OPTIONAL):  # the first one by its branch, which the cache remembers so
            try:
                path = Path(hf_hub_download(repo, name, revision=revision if name == CONFIG else folder.name,
                                            library_name='timm_npu_irv2', local_files_only=unreachable is not None))
            except EntryNotFoundError as error:
                if name in _REQUIRED:
                    raise unreachable or error from None
                continue
            folder = path.parent
            _check_hash(path, repo, folder.name)
    return folder


def _unreachable(repo: str, revision: str | None, name: str) -> Exception | None:
    """Why the hub can't be asked about a file, in which case the cache will have to do.

    One question without retries: hf_hub_download alone takes half a minute to find out that there is no network.
    """
    try:
        get_hf_file_metadata(hf_hub_url(repo, name, revision=revision))
    except (HTTPError, OSError) as error:  # OfflineModeIsEnabled is one of the latter
        if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
            raise
        return error
    return None


def _check_hash(path: Path, repo: str, commit: str) -> None:
    """Compare a file of the cache with the hash that the hub gave for it; huggingface_hub looks at sizes alone."""
    blob = path.resolve()
    expected = blob.name if path.is_symlink() else (  # the cache names its blobs by their hashes
        get_hf_file_metadata(hf_hub_url(repo, path.name, revision=commit)).etag)
    content = blob.read_bytes()
    if len(expected or '') == 64:  # a file of Git LFS
        actual = hashlib.sha256(content).hexdigest()
    else:  # Git's hash of a blob
        actual = hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()
    if actual != expected:
        path.unlink()
        blob.unlink(missing_ok=True)
        raise UserError(f'{repo}: {path.name} is damaged: its hash is {actual[:12]}…, not {str(expected)[:12]}…. It is '
                        'out of the cache again; try once more, and if it stays so, the hub or mirror has it damaged.')


def _check_folder(folder: Path) -> None:
    missing = [name for name in _REQUIRED if not (folder / name).is_file()]
    if missing:
        raise UserError(f'{folder} is no exported model: it has no {" and no ".join(missing)}. '
                        '`python -m timm_npu_irv2.hub export CHECKPOINT FOLDER` writes one.')


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn whatever huggingface_hub raises into a UserError of one line.

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
    chain = [error]
    while (error := error.__cause__ or error.__context__) is not None and error not in chain:
        chain.append(error)
    status = next((each.response.status_code for each in chain if isinstance(each, HfHubHTTPError)), None)
    kinds: list[tuple[Any, str]] = [
        (GatedRepoError, 'its owner must grant access first: ask for it on its page, then `hf auth login`.'),
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
        return (f'it has no {WEIGHTS} and {CONFIG} in that revision; other formats than safetensors, which can run '
                'code when they are read, are not taken.')
    if status is not None:
        return f'{where} answers {status}: {_one_line(chain[0])}'
    broken = next((each for each in chain if isinstance(each, HTTPError | LocalEntryNotFoundError)), None)
    if broken is not None:
        return (f'{where} cannot be reached, and it is not in the cache ({_one_line(broken)}): check the network, '
                'set HF_ENDPOINT to a mirror, or load from a folder with local-dir:.')
    return _one_line(chain[0])


def _one_line(error: BaseException) -> str:
    return ' '.join((str(error) or type(error).__name__).split())[:300]


# ------------------------------------------------------------------------------------------------------- loading


def from_pretrained(name: str | os.PathLike, **kwargs: Any) -> nn.Module:
    """This package's network with the weights of a repository or folder in timm's format, ours or stock timm's.

    Args:
        name: 'owner/name', 'owner/name@revision' (with or without 'hf-hub:'), or a folder (or 'local-dir:FOLDER').
        kwargs: As for ``timm.create_model``; ``num_classes`` and ``in_chans`` adapt the weights.

    Returns:
        The network; ``pretrained_cfg`` has its preprocessing and, if they were published, ``label_names``.

    Raises:
        UserError: It cannot be had (see :func:`pull`), or it is another network.
    """
    name = os.fspath(name)
    source, _, rest = name.partition(':')
    if source == 'local-dir' or (source != 'hf-hub' and Path(name).is_dir()):
        folder = Path(rest if source == 'local-dir' else name)
    else:
        folder = _download(*_split_revision(rest if source == 'hf-hub' else name))
    _check_folder(folder)
    try:
        pretrained_cfg, architecture, arguments = load_model_config_from_path(folder)
        if architecture not in ARCHITECTURES.values():
            raise UserError(f'{name} is a {architecture}, not an Inception-ResNet-v2: load it with timm.create_model.')
        pretrained_cfg['architecture'] = OURS
        return timm.create_model(OURS, pretrained=True, pretrained_cfg=pretrained_cfg, **{**arguments, **kwargs})
    except (KeyError, RuntimeError, OSError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f'{name} cannot be loaded: {_one_line(error)}') from error


def create_model(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """``timm.create_model`` for scripts: of the hub it reads no pickle, checks what it reads, and fails in a line.

    Args:
        name: The name of any model of timm's, 'hf-hub:owner/name' or 'local-dir:FOLDER'.
        pretrained: Load its weights.
        kwargs: timm's.

    Raises:
        UserError: There is no such model, or its weights cannot be had.
    """
    source, _, repo = name.partition(':')
    with explained(name):
        if source == 'hf-hub':
            folder = _download(*_split_revision(repo))
            return timm.create_model(f'local-dir:{folder}', pretrained=pretrained, **kwargs)
        cfg = get_pretrained_cfg(name, allow_unregistered=True) if pretrained and not repo else None
        if cfg is not None and cfg.hf_hub_id and 'pretrained_cfg' not in kwargs:
            # timm asks for both formats again and again before it gives up: a minute without a network.
            unreachable = _unreachable(cfg.hf_hub_id, None, WEIGHTS)
            if unreachable is not None and not isinstance(try_to_load_from_cache(cfg.hf_hub_id, WEIGHTS), str):
                raise unreachable
            kwargs = {'pretrained_cfg_overlay': {'hf_hub_filename': WEIGHTS}, **kwargs}
        return timm.create_model(name, pretrained=pretrained, **kwargs)


def _split_revision(repo: str) -> tuple[str, str | None]:
    name, _, revision = repo.partition('@')
    return name, revision or None


def create(pretrained: bool | str | os.PathLike = False, **kwargs: Any) -> nn.Module:
    """The network for ``hubconf.py``: timm's ``create_model`` where ``pretrained`` may say where the weights are.

    Args:
        pretrained: False for random weights; True, or a tag such as 'tf_in1k', for published ones; 'hf-hub:owner/name'
            or 'local-dir:FOLDER'; or the path of a checkpoint in any dialect, averaged weights first.
        kwargs: As for ``timm.create_model``.

    Raises:
        UserError: There are no such weights, or they cannot be had.
    """
    if isinstance(pretrained, bool):
        return create_model(OURS, pretrained=pretrained, **kwargs)
    source = os.fspath(pretrained)
    if source.startswith(('hf-hub:', 'local-dir:')) or Path(source).is_dir():
        return from_pretrained(source, **kwargs)
    if Path(source).is_file():
        return _from_file(Path(source), **kwargs)
    tags = sorted(name.partition('.')[2] for name in timm.list_pretrained(f'{OURS}.*'))
    if source not in tags:
        raise UserError(f"pretrained='{source}' is neither a file nor a folder, nor one of the tags {', '.join(tags)}; "
                        "a repository of the hub is 'hf-hub:owner/name'.")
    return create_model(f'{OURS}.{source}', pretrained=True, **kwargs)


def _from_file(path: Path, **kwargs: Any) -> nn.Module:
    content = _read_checkpoint(path, None)
    state_dict = weights.convert(content.state_dict, to='timm')
    cfg = get_pretrained_cfg(OURS).to_dict()
    cfg |= {key: content.args[key] for key in _PREPROCESSING if key in cfg and content.args.get(key)}
    channels, size = state_dict['conv2d_1a.conv.weight'].shape[1], content.args.get('img_size')
    cfg['input_size'] = (channels, *([size, size] if size else cfg['input_size'][1:]))
    cfg |= {'num_classes': len(state_dict.get('classif.weight', ())), 'state_dict': state_dict}
    cfg['label_names'] = _names_in(content, cfg['num_classes'])
    arguments = {'num_classes': cfg['num_classes'], 'in_chans': channels, 'global_pool': content.args.get('gp'),
                 **(content.args.get('model_kwargs') or {}), **kwargs}
    try:
        model = timm.create_model(OURS, pretrained=True, pretrained_cfg=cfg, **arguments)
    except (RuntimeError, TypeError) as error:
        raise UserError(f'{path} does not fit {OURS}: {_one_line(error)}') from error
    model.pretrained_cfg.pop('state_dict', None)  # or the weights would be in memory twice
    return model


# -------------------------------------------------------------------------------------------------- command line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='python -m timm_npu_irv2.hub', description='Publish Inception-ResNet-v2 on the Hugging Face Hub.')
    commands = parser.add_subparsers(dest='command', required=True, metavar='export|push|pull')
    add = commands.add_parser('export', help='write a checkpoint as a repository into a folder')
    add.add_argument('checkpoint', metavar='CHECKPOINT', help="a file of train.py's, timm's, Cadene's or the zoo's")
    add.add_argument('folder', metavar='FOLDER', help='where to write')
    add.add_argument('--for', dest='target', choices=tuple(ARCHITECTURES), default='npu',
                     help="whose network loads it: this package's, or stock timm's (default: npu)")
    add.add_argument('--ema', action='store_true', help='take the averaged weights')
    add.add_argument('--dtype', choices=('float32', 'float16', 'bfloat16'), default='float32',
                     help='round the weights to it (default: float32)')
    add.add_argument('--class-names', metavar='FILE', help='names of the classes, one a line, or a data set folder')
    add.add_argument('--report', metavar='FILE', help="accuracy to publish: a report.json, or validate.py's JSON "
                     '(default: the report.json beside the checkpoint)')
    add.add_argument('--license', default='apache-2.0', help='(default: apache-2.0)')
    add.add_argument('--dataset', action='append', default=[], dest='datasets', metavar='NAME',
                     help="the hub's name of the data set, such as imagenet-1k; can be given several times")
    add.add_argument('--img-size', type=int, metavar='N', help="image size (default: the training's)")
    for name in 'mean', 'std':
        add.add_argument(f'--{name}', type=float, nargs='+', metavar='X', help="of images (default: the training's)")
    add.add_argument('--crop-pct', type=float, metavar='F', help="centre crop (default: the training's)")
    add.add_argument('--interpolation', help="resize method (default: the training's)")
    add = commands.add_parser('push', help='upload a folder')
    add.add_argument('folder', metavar='FOLDER', help='what export wrote')
    add.add_argument('repo', metavar='REPO', help='owner/name')
    add.add_argument('--private', action='store_true', help='make a new repository private')
    add.add_argument('--revision', metavar='BRANCH', help='branch to commit to (default: main)')
    add = commands.add_parser('pull', help='download a repository and check it')
    add.add_argument('repo', metavar='REPO', help='owner/name')
    add.add_argument('folder', metavar='FOLDER', nargs='?', help="where to (default: the repository's name)")
    add.add_argument('--revision', help='branch, tag or commit (default: main)')
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        if args.command == 'export':
            given = {key: getattr(args, key) for key in _PREPROCESSING if getattr(args, key, None) is not None}
            export(args.checkpoint, args.folder, target=args.target, ema=args.ema, dtype=args.dtype,
                   class_names=args.class_names, report=args.report, license=args.license, datasets=args.datasets,
                   preprocessing=given)
            print(f"{args.folder} is ready: timm.create_model('local-dir:{args.folder}', pretrained=True), or "
                  f'{parser.prog} push {args.folder} OWNER/NAME')
        elif args.command == 'push':
            print(push(args.folder, args.repo, private=args.private, revision=args.revision))
        else:
            print(f'{pull(args.repo, args.folder, revision=args.revision)} is complete and its hashes are right')
    except UserError as error:
        print(f'{parser.prog}: error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
