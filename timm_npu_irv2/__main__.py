"""``python -m timm_npu_irv2``: the console command."""

import sys

from .cli.main import main

if __name__ == '__main__':
    sys.exit(main())
