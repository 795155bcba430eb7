"""The options of make_shards.py as data."""

from .flags import pick
from .parser import CommandLine, Flag, Group

__all__ = ['MAKE_SHARDS']

MAKE_SHARDS = CommandLine('make_shards.py', (
    'Make WebDataset shards of a folder of images, go on with an interrupted run, or write damaged shards again. '
    '--dataset wds/NAME --data-dir OUT reads them.'), (
    Group('Files', (
        Flag('paths', 'folder with train/ and val/ or with class folders, or a tar file; folder of the shards',
             rest={'nargs': '+', 'metavar': 'DIR OUT'}),
        *pick('class_map'),
        Flag('--check', 'compare the shards of OUT with their checksums', bool, False),
    )),
    Group('Shards', (
        Flag('--images-per-shard', 'images in a shard', int, 1000, '[1, inf)', {'metavar': 'N'}),
        Flag('--seed', 'seed of the shuffle of the training images', int, 42, rest={'metavar': 'N'}),
    )),
), takes_config=False, usage='%(prog)s DIR OUT [options]\n       %(prog)s --check OUT')
