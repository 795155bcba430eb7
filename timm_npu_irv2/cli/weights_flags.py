"""The options of ``timm-npu-irv2 weights`` as data."""

from .parser import CommandLine, Flag, Group

__all__ = ['WEIGHTS']

WEIGHTS = CommandLine('timm-npu-irv2 weights', 'Translate weights of Inception-ResNet-v2 between dialects.', (
    Group('Files', (
        Flag('input', 'file in any dialect: .safetensors or .pth', rest={'metavar': 'IN'}),
        Flag('output', 'file to write: .safetensors or .pth', rest={'metavar': 'OUT'}),
    )),
    Group('Translation', (
        Flag('--to', 'dialect to write', rest={'required': True, 'choices': ('npu', 'timm', 'cadene')}),
        Flag('--use-ema', 'read the averaged weights (EMA) if the file has them', bool, False),
    )),
), takes_config=False, usage=None)
