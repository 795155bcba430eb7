"""The command line of the hub: export, push, pull."""

import timm_npu_irv2.cli.environment  # noqa: F401 - sets variables that libraries read when they are loaded

# isort: split
import sys
from argparse import Namespace
from collections.abc import Sequence

from ..cli.hub_flags import HUB
from ..cli.script import run_script
from ..escaping import printable
from .checkpoint import PREPROCESSING
from .client import push
from .export import export
from .load import pull


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit code."""
    return run_script(HUB.prog, _run, sys.argv[1:] if argv is None else argv)


def _run(argv: Sequence[str]) -> int:
    args = HUB.parse(argv)
    if args.command == 'export':
        _export(args)
    elif args.command == 'push':
        print(push(args.folder, args.repo, private=args.private, revision=args.revision))
    else:
        print(printable(f'{pull(args.repo, args.folder, revision=args.revision)} was downloaded and verified'))
    return 0


def _export(args: Namespace) -> None:
    given = {key: getattr(args, key) for key in PREPROCESSING if getattr(args, key) is not None}
    export(args.checkpoint, args.folder, target=args.target, ema=args.ema, dtype=args.dtype,
           class_names=args.class_names, report=args.report, license=args.license, datasets=args.datasets,
           preprocessing=given)
    folder = printable(args.folder)
    print(f"Wrote {folder}. Load it with timm.create_model('local-dir:{folder}', pretrained=True), or publish it with "
          f'`{HUB.prog} push {folder} OWNER/NAME`.')


if __name__ == '__main__':
    sys.exit(main())
