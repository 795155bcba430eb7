"""The torch.library namespace of the plugin's operators: ``torch.ops.timm_npu_irv2``."""

import torch

# Kept for the life of the process: an operator's registrations go when their Library object does.
LIBRARY = torch.library.Library('timm_npu_irv2', 'DEF')
