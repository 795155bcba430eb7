#!/usr/bin/env python3
"""Make WebDataset shards of a folder of images, which --dataset wds/NAME reads.

    python train_scripts/make_shards.py DIR OUT         # train/ and val/ of DIR as shards, as timm reads them
    python train_scripts/make_shards.py --check OUT     # compare the shards with their checksums

The same command goes on with an interrupted run, and writes shards again that are damaged.
"""

import sys

from timm_npu_irv2.cli.make_shards_flags import MAKE_SHARDS
from timm_npu_irv2.cli.script import check_command_line

if __name__ == '__main__':
    check_command_line(MAKE_SHARDS, sys.argv[1:])  # before the imports below, which take seconds

# isort: split
from collections.abc import Sequence
from pathlib import Path

from timm_npu_irv2.cli.script import run_script
from timm_npu_irv2.data.shard_writer import check_shards, write_shards
from timm_npu_irv2.errors import UserError
from timm_npu_irv2.escaping import printable


def main(argv: Sequence[str]) -> int:
    """Make or check the shards, and print how many there are."""
    args = MAKE_SHARDS.parse(argv)
    if len(args.paths) != (1 if args.check else 2):
        raise UserError('name the folder of the shards with --check, otherwise that of the images and that of the '
                        'shards.')
    if args.check:
        print(printable(f'{args.paths[0]}: {check_shards(Path(args.paths[0]))} shards are whole'))
        return 0
    root, out = map(Path, args.paths)
    try:
        total, written = write_shards(
            root, out, images_per_shard=args.images_per_shard, seed=args.seed, class_map=args.class_map)
    except KeyboardInterrupt:
        print(f'{MAKE_SHARDS.prog}: interrupted; the same command goes on', file=sys.stderr)
        raise
    print(printable(f'{out}: {total} shards, of which {written} were written now'))
    return 0


if __name__ == '__main__':
    sys.exit(run_script(MAKE_SHARDS.prog, main, sys.argv[1:]))
