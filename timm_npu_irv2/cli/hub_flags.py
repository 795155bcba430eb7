"""The options of ``timm-npu-irv2 hub`` as data."""

from typing import Any

from .parser import CommandLine, Flag, Group, Subcommands

__all__ = ['HUB']


def _number(name: str, help: str, type: Any, within: str, metavar: str, **rest: Any) -> Flag:
    return Flag(f'--{name}', f'{help} (default: that of the training)', type, within=within,
                rest={'metavar': metavar, **rest})


_FOLDER = Flag('folder', 'folder that export wrote', rest={'metavar': 'FOLDER'})
_REPO = Flag('repo', 'owner/name', rest={'metavar': 'REPO'})

_EXPORT = (
    Group('Files', (
        Flag('checkpoint', 'file that train.py, timm, Cadene or Ascend ModelZoo wrote', rest={'metavar': 'CHECKPOINT'}),
        Flag('folder', 'folder to write to', rest={'metavar': 'FOLDER'}),
    )),
    Group('Model', (
        Flag('--for', "network that loads it: this package's, or stock timm's", default='npu',
             rest={'dest': 'target', 'choices': ('npu', 'timm')}),
        Flag('--ema', 'export the averaged weights', bool, False),
        Flag('--dtype', 'type to round the weights to', default='float32',
             rest={'choices': ('float32', 'float16', 'bfloat16')}),
    )),
    Group('Model card', (
        Flag('--class-names', 'file with a class name in each line, or folder or tar file of class folders',
             rest={'metavar': 'FILE'}),
        Flag('--report', 'accuracy to publish: a report.json, or the JSON of validate.py (default: the report.json '
             'beside the checkpoint)', rest={'metavar': 'FILE'}),
        Flag('--license', 'license of the weights', default='apache-2.0', rest={'metavar': 'NAME'}),
        Flag('--dataset', 'name of the data set on the hub, such as imagenet-1k; may be repeated', default=[],
             rest={'action': 'append', 'dest': 'datasets', 'metavar': 'NAME'}),
    )),
    Group('Preprocessing', (
        _number('img-size', 'image size', int, '[75, inf)', 'N'),
        _number('mean', 'mean of the images', float, '(-inf, inf)', 'X', nargs='+'),
        _number('std', 'standard deviation of the images', float, '(0, inf)', 'X', nargs='+'),
        _number('crop-pct', 'centre crop', float, '(0, inf)', 'F'),
        Flag('--interpolation', 'resize method (default: that of the training)', rest={'metavar': 'NAME'}),
    )),
)
_PUSH = (Group('Upload', (
    _FOLDER, _REPO,
    Flag('--private', 'make a new repository private', bool, False),
    Flag('--revision', 'branch to commit to (default: main)', rest={'metavar': 'BRANCH'}),
)),)
_PULL = (Group('Download', (
    _REPO,
    Flag('folder', 'folder to write to (default: the name of the repository)',
         rest={'metavar': 'FOLDER', 'nargs': '?'}),
    Flag('--revision', 'branch, tag or commit (default: main)', rest={'metavar': 'REVISION'}),
)),)


def _command(name: str, description: str, groups: tuple[Group, ...]) -> CommandLine:
    return CommandLine(f'timm-npu-irv2 hub {name}', description, groups, takes_config=False, usage=None)


HUB = Subcommands('timm-npu-irv2 hub', 'Publish Inception-ResNet-v2 on the Hugging Face Hub.', {
    'export': _command('export', 'Write a checkpoint as a repository into a folder.', _EXPORT),
    'push': _command('push', 'Upload a folder.', _PUSH),
    'pull': _command('pull', 'Download a repository and check it.', _PULL),
})
