"""``timm-npu-irv2 weights``: translate a file of weights between dialects."""

import sys
from collections.abc import Sequence

from ..errors import UserError
from ..escaping import printable
from ..serialization import load_weights, save_weights
from ..weights import convert, detect_dialect
from .script import run_script
from .weights_flags import WEIGHTS

__all__ = ['main']


def main(argv: Sequence[str]) -> int:
    """Translate, and print the dialects."""
    args = WEIGHTS.parse(argv)
    _check_output(args.output)
    source = load_weights(args.input, use_ema=args.use_ema)
    dialect = detect_dialect(source)
    save_weights(convert(source, to=args.to), args.output)
    print(printable(f'{args.input} ({dialect}) -> {args.output} ({args.to}), {len(source)} tensors read'))
    return 0


def _check_output(path: str) -> None:
    """Raise UserError for an ending of another format, which would be written as a pickle of torch's."""
    if not path.endswith(('.safetensors', '.pth', '.pt', '.bin', '.tar')):
        further = ' `timm-npu-irv2 export-onnx` writes ONNX.' if path.endswith('.onnx') else ''
        raise UserError(f'cannot write {path}: use the ending .safetensors or .pth.{further}')


if __name__ == '__main__':
    sys.exit(run_script(WEIGHTS.prog, main, sys.argv[1:]))
