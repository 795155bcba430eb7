"""A step at O2 of a small network on the chip of this process: `python -m tests.npu.chip_pieces MOMENTUM` prints the
operators that it called, what the log says and the form of 1×1 convolutions, as JSON."""

import json
import logging
import sys
from collections import Counter

import standin_journal
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from timm_npu_irv2 import device as devices
from timm_npu_irv2.precision import create_precision


def main() -> None:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger('timm_npu_irv2').addHandler(handler)
    logging.getLogger('timm_npu_irv2').setLevel(logging.INFO)
    device = devices.resolve_device('npu')
    # The vendor's choice for the 910A is legacy operators in private formats, of which the stand-in has none.
    devices.configure(device, allow_internal_format=False, jit_compile=False)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))
    network(torch.zeros(2, 3, 9, 9))
    network.to(device)
    precision = create_precision(device, amp=True, opt_level='O2', loss_scale=128.0)
    optimizer = create_optimizer_v2(network, 'momentum', lr=0.1, momentum=float(sys.argv[1]))
    network, optimizer = precision.prepare(network, optimizer)
    images, targets = torch.ones(2, 3, 9, 9, device=device), torch.arange(2, device=device)
    with standin_journal.recording() as record:
        for _ in range(2):
            optimizer.zero_grad()
            precision.step(nn.functional.cross_entropy(network(images), targets), optimizer)
    print(json.dumps({'calls': Counter(record.calls()), 'log': lines, 'pointwise': devices.pointwise_form(device.type),
                      'finite': all(p.isfinite().all().item() for p in network.parameters())}))


if __name__ == '__main__':
    main()
