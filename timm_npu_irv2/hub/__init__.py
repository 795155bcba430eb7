"""Published models: a checkpoint as a Hugging Face Hub repository in timm's format, pushed, pulled and loaded.

    timm-npu-irv2 hub export CHECKPOINT FOLDER [--ema] [--for npu|timm] [--dtype float16]
    timm-npu-irv2 hub push FOLDER OWNER/NAME [--private] [--revision BRANCH]
    timm-npu-irv2 hub pull OWNER/NAME [FOLDER] [--revision REVISION]

A repository holds ``model.safetensors``, ``config.json``, a model card and, where the checkpoint came with one, a
picture of the training; nothing that has to be unpickled is written or read. HF_ENDPOINT, HF_HUB_OFFLINE, HF_HOME,
HF_TOKEN and the token of ``hf auth login`` mean what they mean to huggingface_hub.
"""

from ..published import translate_hub_errors
from .client import prepare, push
from .export import export
from .load import check_published, create, create_model, from_pretrained, pull

__all__ = ['check_published', 'create', 'create_model', 'export', 'from_pretrained', 'prepare', 'pull', 'push',
           'translate_hub_errors']
