"""The model card of a published network, for the hub and for people.

Its front matter is huggingface_hub's own :class:`ModelCardData`. Each block of code in the body runs as it stands.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from ..cli.flags import RECIPE
from ..data.pipeline import MODE_OF_CHANNELS
from ..escaping import markdown_code, markdown_fence, markdown_text

__all__ = ['address', 'write']

# Options without effect where another is not set.
_DEPENDS_ON = {
    'model_ema_decay': 'model_ema', 'amp_impl': 'amp', 'amp_dtype': 'amp', 'opt_level': 'amp', 'loss_scale': 'amp',
    'clip_mode': 'clip_grad', 'remode': 'reprob', 'recount': 'reprob', 'mixup_off_epoch': 'mixup',
}

_DECAYS: dict[str, tuple[str, ...]] = {
    'step': ('decay_epochs', 'decay_rate'), 'multistep': ('decay_milestones', 'decay_rate'),
}

_NEEDS = {
    'npu': 'It needs the plugin `timm-npu-irv2` for timm.',
    'timm': "It is timm's own `inception_resnet_v2`; the first way below needs only timm.",
}

_BODY = '''\
# {title}

Inception-ResNet-v2 ([Szegedy et al., 2016](https://arxiv.org/abs/1602.07261)) for the classification of images, \
{classes} classes, {size} px. {needs}

## How to use it

The blocks read a photograph `image.jpg` in the current folder. With timm:

```python
import timm
import torch
from PIL import Image

model = timm.create_model('{id}', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
with torch.inference_mode():
    logits = model(transform(Image.open('image.jpg').convert('{mode}')).unsqueeze(0))
names = model.pretrained_cfg.get('label_names')
for probability, index in zip(*logits.softmax(-1)[0].topk({top})):
    print(f'{{names[index] if names else index}}: {{probability:.1%}}')
```

On an NPU, if there is one, or a GPU; with `timm-npu-irv2`, whose network runs fewer operators for the same numbers:

```python
import torch
from timm_npu_irv2.device import resolve_device
from timm_npu_irv2.hub import from_pretrained

device = resolve_device()
model = from_pretrained('{id}').to(device).eval()
with torch.inference_mode():
    print(model(torch.zeros(1, {channels}, {size}, {size}, device=device)).shape)
```

With torch.hub, in a clone of the plugin's repository, which need not be installed:

```python
import torch

model = torch.hub.load('.', 'inception_resnet_v2_npu', source='local', pretrained='{id}')
features = torch.hub.load('.', 'inception_resnet_v2_npu_features', source='local', pretrained='{id}')
```

From the command line, in such a clone:

```bash
python train_scripts/inference.py image.jpg --model {id} --topk {top} --picture answers.png
```
'''


def write(
        name: str,
        config: Mapping[str, Any],
        *,
        target: str,
        license: str,
        datasets: Sequence[str],
        recipe: Mapping[str, Any],
        figures: Mapping[str, Any],
        averaged: bool,
        dtype: str,
        curves: str | None,
) -> str:
    """Return the text of the card.

    Args:
        name: The name of the model and of its folder; until :func:`address` changes it, the code loads that folder.
        config: The contents of config.json.
        target: 'npu' or 'timm'.
        license: The name of the license on the hub.
        datasets: The names of the data sets on the hub.
        recipe: The options of the training; only those that influence the result are published.
        figures: The entries of report.json about these weights; empty, or without top1, if nothing is known.
        averaged: True if the weights are the moving average.
        dtype: The type that the weights were rounded to.
        curves: The name of the picture of the training.
    """
    size = config['pretrained_cfg']['input_size']
    folder = name if re.fullmatch(r'[\w.\-]+', name) else 'FOLDER'  # nothing that ends the string it stands in
    body = _BODY.format(
        title=markdown_text(name), id=f'local-dir:{folder}', needs=_NEEDS[target],
        classes=config['num_classes'], top=min(5, config['num_classes']), size=size[-1], channels=size[0],
        mode=config.get('input_img_mode') or MODE_OF_CHANNELS.get(size[0], 'RGB'))
    parts = [body, _results(figures, averaged, dtype), _training(recipe, figures), _labels(config)]
    if curves:
        parts.append(f'![Loss, accuracy, learning rate and throughput over the epochs]({curves})\n')
    header = _header(name, target, license, datasets, recipe, figures)
    return f'---\n{header}\n---\n\n' + '\n'.join(part for part in parts if part)


def address(text: str, model_id: str) -> str:
    """Return the card with ``model_id``, 'hf-hub:owner/name', wherever it loads a folder."""
    return re.sub(r'local-dir:[\w.\-]+', model_id, text)


def _header(
        name: str,
        target: str,
        license: str,
        datasets: Sequence[str],
        recipe: Mapping[str, Any],
        figures: Mapping[str, Any],
) -> str:
    data = ModelCardData(
        library_name='timm',
        pipeline_tag='image-classification',
        license=license,
        datasets=list(datasets) or None,
        tags=['image-classification', 'timm', 'inception-resnet-v2', *(['ascend', 'npu'] if target == 'npu' else [])],
        metrics=['accuracy'],
        model_name=name,
        eval_results=_eval_results(datasets, recipe, figures) or None,
    )
    return data.to_yaml()


def _eval_results(datasets: Sequence[str], recipe: Mapping[str, Any], figures: Mapping[str, Any]) -> list[EvalResult]:
    """Return top-1 and top-5 in percent, in the hub's form of a model index."""
    dataset = datasets[0] if datasets else 'imagefolder'
    return [
        EvalResult(
            task_type='image-classification', task_name='Image Classification', dataset_type=dataset,
            dataset_name=dataset if datasets else 'images in folders', dataset_split=recipe.get('val_split') or None,
            metric_type='accuracy', metric_name=f'{label} accuracy (%)', metric_value=round(figures[key], 4))
        for key, label in (('top1', 'Top-1'), ('top5', 'Top-5')) if figures.get(key) is not None
    ]


def _results(figures: Mapping[str, Any], averaged: bool, dtype: str) -> str:
    if figures.get('top1') is None:
        return ''
    rows = [f'| top-1 | {figures["top1"]:.2f} % |']
    if figures.get('top5') is not None:
        rows.append(f'| top-5 | {figures["top5"]:.2f} % |')
    note = 'Measured on the whole validation set, each image once'
    note += ', with the moving average of the weights, which is what is published here' if averaged else ''
    note += f'; before the weights were rounded to {dtype}' if dtype != 'float32' else ''
    return '\n'.join(['## Accuracy\n', '| | |', '|---|---|', *rows, '', f'{note}.', ''])


def _training(recipe: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    known = {key: list(value) if isinstance(value, tuple) else value for key, value in recipe.items() if key in RECIPE}
    published = {key: known[key] for key in RECIPE if key in known and _matters(key, known)}
    if not published:
        return ''
    lines = ['## How it was trained\n']
    device, versions = figures.get('device') or {}, figures.get('versions') or {}
    if device and all(figures.get(key) for key in ('seconds', 'epochs', 'world_size', 'precision')):
        story = (f'{figures["epochs"]} epochs in {figures["seconds"] / 3600:.1f} hours on {figures["world_size"]} × '
                 f'{device["type"]} ({device["name"]}), {figures["precision"]}; '
                 f'{", ".join(f"{package} {version}" for package, version in versions.items())}.')
        lines += [f'{markdown_text(story)}\n']
    recipe_text = yaml.safe_dump(published, sort_keys=False, default_flow_style=None, width=110)
    return '\n'.join([*lines, 'The recipe, which `train.py -c` reads:\n', markdown_fence(recipe_text, 'yaml'), ''])


def _matters(key: str, recipe: Mapping[str, Any]) -> bool:
    """Return True if an option has an effect. A 0 has one: it says that something usual was not done."""
    value = recipe[key]
    if value is None or value is False or value in ('', [], {}):
        return False
    if key in ('lr_base', 'lr_base_size'):
        return recipe.get('lr') is None
    if key.startswith('decay_'):
        return key in _DECAYS.get(str(recipe.get('sched')), ())
    return key not in _DEPENDS_ON or bool(recipe.get(_DEPENDS_ON[key]))


def _labels(config: Mapping[str, Any]) -> str:
    names = config.get('label_names')
    if not names:
        return ''
    shown = ', '.join(markdown_code(name) for name in names[:10])
    more = f' … and {len(names) - 10} more, in `config.json`' if len(names) > 10 else ''
    return f'## Classes\n\n{shown}{more}.\n'
