"""Data sets of Hugging Face's library, from a local folder: pixels, classes by name, and a training on them."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from timm_npu_irv2.data.dataset import class_to_idx, open_dataset
from timm_npu_irv2.errors import UserError

pytestmark = pytest.mark.filterwarnings('ignore')

CLASSES = ['tulip', 'rose']  # not in the order of their names
COUNTS = {'train': 8, 'test': 4}


@pytest.fixture
def flowers(tmp_path, monkeypatch) -> str:
    """A cache folder; the working folder has a data set of the name 'flowers'."""
    datasets = pytest.importorskip('datasets', reason="Hugging Face's library datasets is not installed")
    monkeypatch.chdir(tmp_path)
    features = datasets.Features({'image': datasets.Image(), 'label': datasets.ClassLabel(names=CLASSES)})
    for split, count in COUNTS.items():
        pictures = [Image.new('RGB', (80, 70), (20 * index, 0, 0)) for index in range(count)]
        columns = {'image': pictures, 'label': [index % 2 for index in range(count)]}
        Path('flowers').mkdir(exist_ok=True)
        datasets.Dataset.from_dict(columns, features).to_parquet(f'flowers/{split}.parquet')
    return str(tmp_path / 'cache')


@pytest.mark.parametrize('expected', [None, {'rose': 0, 'tulip': 1}])
def test_images_and_classes_are_those_of_the_data_set(flowers, expected):
    opened = open_dataset('hfds/flowers', flowers, 'test', class_to_idx=expected)
    numbers = expected or {name: index for index, name in enumerate(CLASSES)}
    assert class_to_idx(opened) == numbers
    assert [target for _, target in opened] == [numbers[CLASSES[index % 2]] for index in range(COUNTS['test'])]
    assert np.asarray(opened[3][0])[0, 0].tolist() == [60, 0, 0]


def test_a_class_that_the_network_does_not_know_is_refused(flowers):
    with pytest.raises(UserError, match='rose'):
        open_dataset('hfds/flowers', flowers, 'test', class_to_idx={'tulip': 0, 'daisy': 1})


def test_the_example_of_the_documentation_trains(flowers, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / 'train_scripts'))
    import train  # noqa: PLC0415 - a script

    train.main('--dataset hfds/flowers --data-dir cache --val-split test --input-key image --target-key label '
               '--num-classes 2 --model test_resnet --img-size 64 --device cpu -b 4 -j 1 --epochs 1 --output out '
               '--experiment hub'.split())
    assert (tmp_path / 'out/hub/last.pth.tar').is_file()


def test_a_missing_split_is_one_line(flowers):
    with pytest.raises(UserError, match="data set 'hfds/flowers', split 'holdout'"):
        open_dataset('hfds/flowers', flowers, 'holdout')


def test_a_missing_library_is_named_with_its_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'datasets', None)
    monkeypatch.delitem(sys.modules, 'timm.data.readers.reader_hfds', raising=False)
    with pytest.raises(UserError, match=r'datasets is not installed: pip install datasets\.$'):
        open_dataset('hfds/flowers', str(tmp_path), 'test')
