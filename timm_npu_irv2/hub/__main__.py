"""The command line of the hub: export, push, pull."""

import argparse
import sys
from collections.abc import Sequence

from ..cli.script import run_script
from ..escaping import printable
from .checkpoint import ARCHITECTURES, PREPROCESSING
from .client import push
from .export import export
from .load import pull


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='python -m timm_npu_irv2.hub', description='Publish Inception-ResNet-v2 on the Hugging Face Hub.')
    commands = parser.add_subparsers(dest='command', required=True, metavar='export|push|pull')
    add = commands.add_parser('export', help='write a checkpoint as a repository into a folder')
    add.add_argument('checkpoint', metavar='CHECKPOINT',
                     help='a file that train.py, timm, Cadene or Ascend ModelZoo wrote')
    add.add_argument('folder', metavar='FOLDER', help='the folder to write to')
    add.add_argument('--for', dest='target', choices=tuple(ARCHITECTURES), default='npu',
                     help="the network that loads it: this package's, or stock timm's (default: npu)")
    add.add_argument('--ema', action='store_true', help='export the averaged weights')
    add.add_argument('--dtype', choices=('float32', 'float16', 'bfloat16'), default='float32',
                     help='the type to round the weights to (default: float32)')
    add.add_argument('--class-names', metavar='FILE',
                     help='a file with a class name in each line, or a folder or tar file of class folders')
    add.add_argument('--report', metavar='FILE', help='the accuracy to publish: a report.json, or the JSON of '
                     'validate.py (default: the report.json beside the checkpoint)')
    add.add_argument('--license', default='apache-2.0', help='the license of the weights (default: apache-2.0)')
    add.add_argument('--dataset', action='append', default=[], dest='datasets', metavar='NAME',
                     help='the name of the data set on the hub, such as imagenet-1k; may be repeated')
    add.add_argument('--img-size', type=int, metavar='N', help='image size (default: that of the training)')
    for name in 'mean', 'std':
        add.add_argument(f'--{name}', type=float, nargs='+', metavar='X',
                         help=f'{name} of the images (default: that of the training)')
    add.add_argument('--crop-pct', type=float, metavar='F', help='centre crop (default: that of the training)')
    add.add_argument('--interpolation', help='resize method (default: that of the training)')
    add = commands.add_parser('push', help='upload a folder')
    add.add_argument('folder', metavar='FOLDER', help='a folder that export wrote')
    add.add_argument('repo', metavar='REPO', help='owner/name')
    add.add_argument('--private', action='store_true', help='make a new repository private')
    add.add_argument('--revision', metavar='BRANCH', help='the branch to commit to (default: main)')
    add = commands.add_parser('pull', help='download a repository and check it')
    add.add_argument('repo', metavar='REPO', help='owner/name')
    add.add_argument('folder', metavar='FOLDER', nargs='?',
                     help='the folder to write to (default: the name of the repository)')
    add.add_argument('--revision', help='a branch, tag or commit (default: main)')
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    return run_script(parser.prog, lambda _: _run(args, parser.prog), ())


def _run(args: argparse.Namespace, prog: str) -> int:
    if args.command == 'export':
        given = {key: getattr(args, key) for key in PREPROCESSING if getattr(args, key, None) is not None}
        export(args.checkpoint, args.folder, target=args.target, ema=args.ema, dtype=args.dtype,
               class_names=args.class_names, report=args.report, license=args.license, datasets=args.datasets,
               preprocessing=given)
        folder = printable(args.folder)
        print(f"Wrote {folder}. Load it with timm.create_model('local-dir:{folder}', pretrained=True), or publish "
              f'it with `{prog} push {folder} OWNER/NAME`.')
    elif args.command == 'push':
        print(push(args.folder, args.repo, private=args.private, revision=args.revision))
    else:
        print(printable(f'{pull(args.repo, args.folder, revision=args.revision)} was downloaded and verified'))
    return 0


if __name__ == '__main__':
    sys.exit(main())
