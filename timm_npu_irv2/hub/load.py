"""Networks with published weights: from a repository of the hub, a folder or a checkpoint."""

import os
import shutil
from pathlib import Path
from typing import Any

import timm
from timm.models import get_pretrained_cfg
from timm.models._hub import load_model_config_from_path
from torch import Tensor, nn

from .. import rules, schema
from ..data.pipeline import remember_training, trained_channels
from ..errors import UserError, one_line
from ..published import CONFIG, WEIGHTS, check_available, split_revision, translate_hub_errors
from ..serialization import atomic_file, load_weights, make_folder, read_checkpoint, read_json
from .checkpoint import ARCHITECTURES, OURS, read
from .client import OPTIONAL, REQUIRED, check_folder, download

__all__ = ['check_published', 'create', 'create_model', 'from_pretrained', 'pull']


def from_pretrained(name: str | os.PathLike, **kwargs: Any) -> nn.Module:
    """Return this package's network with the weights of a repository or folder in timm's format, ours or stock timm's.

    Args:
        name: 'owner/name', 'owner/name@revision' (with or without 'hf-hub:'), or a folder (or 'local-dir:FOLDER').
        kwargs: Arguments of ``timm.create_model``; ``num_classes`` and ``in_chans`` adapt the weights.

    Returns:
        The network; ``pretrained_cfg`` has its preprocessing and, if they were published, ``label_names``.

    Raises:
        UserError: It cannot be downloaded (see :func:`pull`), or it is another network.
    """
    name = os.fspath(name)
    source, _, rest = name.partition(':')
    if source == 'local-dir' or (source != 'hf-hub' and Path(name).is_dir()):
        folder = Path(rest if source == 'local-dir' else name)
    else:
        folder = download(*split_revision(rest if source == 'hf-hub' else name))
    check_folder(folder)
    architecture = _check_config(folder, name)
    if architecture not in ARCHITECTURES.values():
        raise UserError(f'{name} is a {architecture}, not an Inception-ResNet-v2: load it with timm.create_model.')
    try:
        pretrained_cfg, _, arguments = load_model_config_from_path(folder)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f'{name} cannot be loaded: {one_line(error)}') from error
    model = _build(pretrained_cfg, load_weights(folder / WEIGHTS), {**arguments, **kwargs}, name)
    return _with_mode(model, read_json(folder / CONFIG).get('input_img_mode'))


def _build(pretrained_cfg: dict[str, Any], state_dict: dict[str, Tensor], arguments: dict[str, Any], name: str) -> Any:
    """Return this package's network with weights that timm adapts to ``arguments``; ``name`` is for messages."""
    registered: Any = get_pretrained_cfg(OURS)
    cfg = {**pretrained_cfg, 'architecture': OURS, 'first_conv': registered.first_conv,
           'classifier': registered.classifier, 'source': '', 'state_dict': state_dict}
    try:
        model: Any = timm.create_model(OURS, pretrained=True, pretrained_cfg=cfg, **arguments)
    except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f'{name} does not fit {OURS}: {one_line(error)}') from error
    model.pretrained_cfg.pop('state_dict', None)  # or the weights would be in memory twice
    return model


def _check_config(folder: Path, name: str) -> str:
    """Return the architecture in a folder's config.json, which is checked: it names no place to load from.

    Raises:
        UserError: The file is missing, or not as :mod:`.schema` describes.
    """
    config, path = read_json(folder / CONFIG), folder / CONFIG
    with rules.naming(path):
        schema.check_config(config, split_revision(name.removeprefix('hf-hub:'))[0])
    classes = {config.get('num_classes'), config.get('model_args', {}).get('num_classes')} - {None}
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    features = 1536 if config['architecture'] in ARCHITECTURES.values() else 64  # fewer than any network has
    if any(count * features * 2 > size for count in classes):  # in half precision
        raise UserError(f'{path} is refused: the weights are too small for {max(classes)} classes.')
    return config['architecture']


def create_model(name: str, pretrained: bool = False, checkpoint_path: str = '', **kwargs: Any) -> nn.Module:
    """Call ``timm.create_model`` for a script: no pickle of the hub is read, and errors are one line.

    Args:
        name: The name of any model of timm's, 'hf-hub:owner/name' or 'local-dir:FOLDER'.
        pretrained: Load its weights.
        checkpoint_path: A file of weights to load instead, averaged ones first.
        kwargs: Further arguments of ``timm.create_model``.

    Raises:
        UserError: There is no such model, or its weights cannot be read or do not fit.
    """
    source, _, repo = name.partition(':')
    given = {key: value for key, value in kwargs.items() if value is not None}
    if checkpoint_path and name == OURS:
        return _from_file(Path(checkpoint_path), **given)
    with translate_hub_errors(checkpoint_path or name):
        if source == 'hf-hub':
            folder = download(*split_revision(repo))
            _check_config(folder, name)
            name = f'local-dir:{folder}'
        elif source == 'local-dir':
            _check_config(Path(repo), name)
        if pretrained and not repo and 'pretrained_cfg' not in kwargs and _hub_id(name):
            check_published(name)
            kwargs = {'pretrained_cfg_overlay': {'hf_hub_filename': WEIGHTS}, **kwargs}
        if Path(checkpoint_path).suffix in ('.npz', '.npy'):  # arrays of JAX, which some models of timm's can read
            return timm.create_model(name, checkpoint_path=checkpoint_path, **kwargs)
        content = read_checkpoint(checkpoint_path) if checkpoint_path else {}
        trained = {'num_classes': (content.get('training') or {}).get('num_classes'),
                   'in_chans': trained_channels(content)}
        try:
            model: Any = timm.create_model(name, pretrained=pretrained, **{**kwargs, **trained, **given})
        except (AssertionError, AttributeError, KeyError, TypeError) as error:  # what its config lacks, or does not fit
            raise UserError(f'{name} cannot be created: {one_line(error)}') from error
        if content:
            model.load_state_dict(content.get('state_dict_ema') or content['state_dict'])
            remember_training(model.pretrained_cfg, content, model.num_classes)
        source, _, repo = name.partition(':')
        return _with_mode(model, read_json(Path(repo, CONFIG)).get('input_img_mode')) if repo else model


def check_published(name: str) -> None:
    """Raise UserError if a model's files are not available, or its config.json has entries that it may not have.

    timm asks for several files again and again before it gives up: a minute without a network. And it hands all that
    a config.json says to ``timm.create_model``.

    Args:
        name: The name of a model of timm's with pretrained weights, 'hf-hub:owner/name' or 'local-dir:FOLDER'.
    """
    source, _, address = name.partition(':')
    repo = None if address else _hub_id(name)
    with translate_hub_errors(name):
        if address:
            _check_config(download(*split_revision(address)) if source == 'hf-hub' else Path(address), name)
        elif repo is not None:
            check_available(repo, None, WEIGHTS)


def _hub_id(name: str) -> str | None:
    """Return the repository that has the pretrained weights of a model of timm's; None if there is none."""
    cfg = get_pretrained_cfg(name, allow_unregistered=True)
    return cfg.hf_hub_id if cfg is not None else None


def create(pretrained: bool | str | os.PathLike = False, **kwargs: Any) -> nn.Module:
    """Return the network for ``hubconf.py``; ``pretrained`` may say where the weights are.

    Args:
        pretrained: False for random weights; True, or a tag such as 'tf_in1k', for published ones; 'hf-hub:owner/name'
            or 'local-dir:FOLDER'; or the path of a checkpoint in any dialect, averaged weights first.
        kwargs: Arguments of ``timm.create_model``.

    Raises:
        UserError: There are no such weights, or they cannot be downloaded or read.
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
    content = read(path, None)
    arguments = content.model_arguments
    registered: Any = get_pretrained_cfg(OURS)
    cfg: dict[str, Any] = registered.to_dict()
    content.describe(cfg)
    mode = cfg.pop('input_img_mode', None)
    cfg['num_classes'] = arguments['num_classes']
    return _with_mode(_build(cfg, content.state_dict, {**arguments, **kwargs}, str(path)), mode)


def _with_mode(model: Any, mode: str | None) -> nn.Module:
    """Return the model with the PIL mode of its images in ``pretrained_cfg``, where timm takes none."""
    if mode:
        model.pretrained_cfg['input_img_mode'] = mode
    return model


def pull(repo: str, folder: str | os.PathLike | None = None, *, revision: str | None = None) -> Path:
    """Download a repository, check it, and put it into ``folder`` (by default one of its name, here).

    The files go through huggingface_hub's cache, so that a second pull needs no download, and no network.

    Returns:
        The folder.

    Raises:
        UserError: No such repository, no permission, no network; a file does not match its hash; the weights are not
            those of this network, or do not fit its config.
        CannotWrite: The folder cannot be written to.
    """
    source = download(repo, revision)
    folder = Path(folder or repo.rpartition('/')[2])
    check_folder(source)
    from_pretrained(source)
    make_folder(folder)
    for name in (*REQUIRED, *OPTIONAL):
        if (source / name).is_file():
            with (source / name).open('rb') as content, atomic_file(folder / name) as file:
                shutil.copyfileobj(content, file)
    return folder
