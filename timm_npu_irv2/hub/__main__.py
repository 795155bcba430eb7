"""The command line of the hub: export, push, pull."""

import argparse
import sys
from collections.abc import Sequence

from ..errors import UserError
from .client import push
from .export import ARCHITECTURES, PREPROCESSING, export
from .load import pull


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
            given = {key: getattr(args, key) for key in PREPROCESSING if getattr(args, key, None) is not None}
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
