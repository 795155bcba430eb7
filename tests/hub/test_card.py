"""Model cards: the hub accepts them, and their code runs."""

import html
import json
import re
import shlex
import subprocess

import markdown_it
import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image

from timm_npu_irv2 import hub
from timm_npu_irv2.escaping import printable
from timm_npu_irv2.hub.__main__ import main

from .conftest import ARGS, CLASSES, REPORT, ROOT, command, environment, python, save_checkpoint, training_entry

pytestmark = pytest.mark.filterwarnings('ignore')


def test_huggingface_hub_accepts_the_card(published, online):
    card = ModelCard.load(published / 'README.md', ignore_metadata_errors=False)
    card.validate()  # asks the server, which reads the metadata as strictly as huggingface_hub does
    data = card.data
    assert data.library_name == 'timm' and data.license == 'apache-2.0' and data.datasets == ['owner/insects']
    assert data.pipeline_tag == 'image-classification' and {'timm', 'npu'} <= set(data.tags)
    [top1, top5] = data.eval_results
    assert (top1.metric_type, top1.metric_value, top1.dataset_type) == ('accuracy', 90.5, 'owner/insects')
    assert top5.metric_value == 99.0 and data.model_name == 'insects'


def test_the_card_tells_the_recipe_and_no_place_of_the_machines(published):
    text = (published / 'README.md').read_text()
    assert 'lr: 0.001' in text and 'hflip: 0.0' in text and '8 × npu (Ascend910B)' in text
    assert '](curves.png)' in text and '`ant`, `bee`' in text and 'amp_impl' not in text
    for file in ('README.md', 'config.json'):
        assert 'secret' not in (published / file).read_text()


def test_every_block_of_the_card_runs(published, server, tmp_path):
    clone = tmp_path / 'clone'
    clone.mkdir()
    for name in ('hubconf.py', 'timm_npu_irv2', 'train_scripts'):
        (clone / name).symlink_to(ROOT / name)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (120, 100, 3), dtype=np.uint8)).save(clone / 'image.jpg')
    env = environment(server, tmp_path / 'home')
    done = command('push', published, 'me/insects', env=env)
    assert done.returncode == 0, done.stderr
    text = server.files('me/insects')['README.md'].decode()
    blocks = re.findall(r'```(\w+)\n(.*?)```', text, flags=re.DOTALL)
    assert [language for language, _ in blocks] == ['python', 'python', 'python', 'bash', 'yaml']
    assert text.count('hf-hub:me/insects') == 5 and 'local-dir' not in text
    code = 'import json, sys\nfor block in json.loads(sys.argv[1]):\n    exec(block, {})'
    done = python(code, json.dumps([block for language, block in blocks if language == 'python']), env=env, cwd=clone)
    assert done.returncode == 0, done.stderr
    assert any(f'{name}: ' in done.stdout for name in CLASSES) and 'torch.Size([1, 4])' in done.stdout
    done = subprocess.run(
        ['bash', '-ec', blocks[3][1]], env=env, cwd=clone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (clone / 'answers.png').stat().st_size > 1000 and any(name in done.stdout for name in CLASSES)
    from timm_npu_irv2.training.options import parse_args  # noqa: PLC0415 - the rest of this file needs no training

    (tmp_path / 'recipe.yaml').write_text(blocks[4][1])
    assert parse_args(['-c', str(tmp_path / 'recipe.yaml')]).hflip == 0


def test_the_commands_of_the_readme_are_known(online, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = '\n'.join((ROOT / name).read_text() for name in ('README.md', 'docs/publish.md'))
    commands = re.findall(r'^timm-npu-irv2 hub (.*)', text, flags=re.MULTILINE)
    assert {each.split()[0] for each in commands} == {'export', 'push', 'pull'}
    options = re.findall(r'`(--(?:for timm|ema|dtype|class-names)[^`]*)`', text)
    assert options
    for words in (*commands, *(f'export a b {each}' for each in options)):
        assert main(shlex.split(words.replace('\n', ' '))) == 2  # not a mistake in the words, which would exit
        assert re.search('no such file|not an exported model|no such repository', capsys.readouterr().err)


def test_the_card_reads_images_as_the_training_did(state_dict, tmp_path):
    pipeline = {'input_size': (3, 96, 96), 'mean': (0.5,) * 3, 'std': (0.5,) * 3, 'input_img_mode': 'YCbCr'}
    path = save_checkpoint(tmp_path / 'last.pth.tar', state_dict, 5, training=training_entry(pipeline=pipeline))
    assert ".convert('YCbCr')" in (hub.export(path, tmp_path / 'out') / 'README.md').read_text()


def test_names_in_a_card_form_no_markup(state_dict, tmp_path):
    """The names of classes, the options of the training and the entries of the report come from files."""
    evil = ['`<script>alert(1)</script>`', '``` \n<img src=x onerror=alert(1)>', '[x](javascript:alert(1))', '=1+1']
    args = {**ARGS, 'opt': '```\n<script>alert(2)</script>', 'aa': '````'}
    training = training_entry(class_to_idx={name: index for index, name in enumerate(evil)})
    path = save_checkpoint(tmp_path / 'last.pth.tar', state_dict, 5, args=args, training=training)
    device = {'type': 'npu', 'name': '<script>alert(3)</script>'}
    (tmp_path / 'report.json').write_text(json.dumps({**REPORT, 'device': device, 'precision': '`O2'}))
    folder = hub.export(path, tmp_path / "it's <b> `x`")
    text = (folder / 'README.md').read_text()
    document = markdown_it.MarkdownIt('gfm-like', {'linkify': False}).render(text.split('---\n', 2)[2])
    assert '<script' not in document and '<img' not in document and '<b>' not in document
    assert 'javascript:' not in re.sub('<code>.*?</code>', '', document, flags=re.DOTALL)
    for name in evil:
        assert html.escape(printable(name)).replace('&#x27;', "'") in document
    assert "local-dir:FOLDER" in text and document.count('<pre>') == 5
