"""The order and the names of many images, which take little memory."""

import hashlib
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_npu_irv2.data.classes import natural_key
from timm_npu_irv2.data.folder import FolderReader, find_images
from timm_npu_irv2.data.listing import Listing, pack
from timm_npu_irv2.errors import UserError

# Pieces that are alike but for case, leading zeros, scripts of digits, or what follows them.
PIECES = [*'aAb .-019٣ΣßİéÉ中😀\udcff\x01', '01', '10']
names = st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).map(''.join).filter(lambda name: name[0] != '.')
paths = st.lists(names, min_size=1, max_size=3).map('/'.join)


def by_parts(text: str) -> tuple[list[int | str], str]:
    """The order as it is defined: numbers by their value, letters without case, then the exact spelling."""
    return [int(part) if part.isdecimal() else part for part in re.split(r'(\d+)', text.lower())], text


@settings(max_examples=300, deadline=None)
@given(st.lists(paths, max_size=12))
def test_the_sort_key_orders_as_numbers_and_letters_do(texts):
    assert sorted(texts, key=natural_key) == sorted(texts, key=by_parts)


@settings(max_examples=300, deadline=None)
@given(st.sets(paths, min_size=1, max_size=12))
def test_a_listing_of_folders_has_the_order_of_all_paths(found):
    folders: dict[str, list[bytes]] = {}
    for path in sorted(found, key=lambda path: natural_key(path.rpartition('/')[2])):
        folder = path[:path.rfind('/') + 1]
        folders.setdefault(folder, []).append(pack([path.removeprefix(folder)], folder))
    listing, expected = Listing.of_folders('root', folders), sorted(found, key=by_parts)
    assert [image.name for image in listing] == expected
    assert [image.folder for image in listing] == [run[0][:-1] for run in listing.runs for _ in range(run[1])]
    assert listing.hash_names() == hashlib.sha256('\0'.join(expected).encode(errors='surrogateescape')).hexdigest()


def touch(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(file)
    return root


def test_folders_whose_images_come_in_turns_are_in_one_order(tmp_path):
    root = touch(tmp_path, 'a/1.png', 'a/3.png', 'a/2/x.png', 'b 2/0.png', 'b/0.png', 'B/00.png', 'B/1.png', 'b/2.png')
    found = [image.name for image in find_images(root)]
    assert found == sorted(found, key=by_parts) and found.index('a/2/x.png') == 1
    assert [found.index(name) for name in ('B/00.png', 'b/0.png', 'B/1.png', 'b/2.png')] == [4, 5, 6, 7]


def test_a_class_map_selects_images_with_their_names_and_classes(tmp_path):
    root = touch(tmp_path, *(f'{folder}/{number}.png' for folder in ('cat', 'dog', 'eel') for number in range(3)))
    reader = FolderReader(root, {'eel': 7, 'cat': 2}, class_map=True)
    assert [(reader.filename(index), reader[index][1]) for index in range(len(reader))] == [
        *((f'cat/{number}.png', 2) for number in range(3)), *((f'eel/{number}.png', 7) for number in range(3))]
    assert reader[4][0].read() == b'eel/1.png' and reader.images.runs == [('cat/', 3), ('eel/', 3)]
    assert reader.images[-1] == reader.images[5] == reader.images[4:][-1]
    with pytest.raises(IndexError):
        reader.images[6]
    with pytest.raises(UserError, match='none of its 9 images is of a class of the class map'):
        FolderReader(root, {'fox': 0}, class_map=True)
