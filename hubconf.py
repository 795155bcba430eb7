"""Entry points of torch.hub: the network and its feature maps, from a clone that need not be installed.

Examples::

    torch.hub.load('owner/repository', 'inception_resnet_v2_npu', pretrained=True)
    torch.hub.load('/path/to/the/clone', 'inception_resnet_v2_npu', source='local', pretrained='model_best.pth.tar')
"""

dependencies = ['torch', 'torchvision', 'timm', 'huggingface_hub', 'safetensors', 'yaml']


def inception_resnet_v2_npu(pretrained=False, **kwargs):
    """Create Inception-ResNet-v2 for NPU, CUDA and CPU, numerically equal to timm's.

    The network takes images (N, 3, H, W) of at least 75 px and returns logits. The mean, standard deviation and crop
    that belong to the weights are in ``model.pretrained_cfg``, with ``label_names`` where these were published.

    Args:
        pretrained: False for random weights; True for timm's (tag tf_in1k); another tag, 'tf_ens_adv_in1k' or
            'cadene_in1k'; 'hf-hub:owner/name' or 'local-dir:FOLDER'; or the path of a checkpoint of train.py, timm,
            Cadene or Ascend ModelZoo.
        kwargs: Arguments of timm.create_model, such as num_classes=10, in_chans=1, drop_rate=0.2, global_pool='avg'.
            Pretrained weights are adapted to num_classes and in_chans.
    """
    from timm_npu_irv2 import hub  # noqa: PLC0415 - torch.hub lists every callable of this module

    return hub.create(pretrained, **kwargs)


def inception_resnet_v2_npu_features(pretrained=False, **kwargs):
    """Create the same network as an extractor of feature maps.

    It takes images and returns a list of feature maps (N, C, H, W) of strides 2, 4, 8, 16 and 32.

    Args:
        pretrained: Weights, as for inception_resnet_v2_npu.
        kwargs: Arguments of timm.create_model, such as out_indices=(2, 3, 4).
    """
    from timm_npu_irv2 import hub  # noqa: PLC0415

    return hub.create(pretrained, features_only=True, **kwargs)
