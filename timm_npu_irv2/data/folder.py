"""Images in folders and tar files, found in one way by training, evaluation, inference and calibration."""

import contextlib
import logging
import os
import posixpath
import tarfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

import numpy as np
from timm.data.readers.img_extensions import get_img_extensions
from timm.data.readers.reader import Reader

from ..distributed import World, agree, share_array
from ..errors import UserError, first_line
from ..serialization import open_regular
from .classes import clean_name, map_classes, natural_key, number_classes
from .listing import ImageFile, Listing, pack
from .tar_index import iterate_members

__all__ = ['ENDINGS', 'FolderReader', 'ImageFile', 'find_images', 'iterate_images', 'list_images']

_logger = logging.getLogger(__name__)

# Besides timm's: what Pillow reads.
ENDINGS = frozenset('.bmp .gif .j2k .jfif .jp2 .jpe .mpo .pbm .pgm .png .pnm .ppm .tif .tiff .webp'.split())

MOST_LINKS = 40  # from one to the next, as in Linux


def find_images(root: str | os.PathLike, tars: bool = False) -> Sequence[ImageFile]:
    """Return the images in a folder, or in a tar file, however deep, in natural order.

    Symbolic links are followed. Hidden files and folders, whose names start with a dot, are left out.

    Args:
        root: Folder or tar file.
        tars: Search tar files in folders, too.

    Raises:
        UserError: No such folder or file, no images in it, or a tar file that cannot be read.
    """
    if tars:
        return sorted(iterate_images(root, tars), key=lambda image: natural_key(image.name))
    return list_images(root)


def list_images(root: str | os.PathLike, endings: Collection[str] = ()) -> Listing:
    """Return the images of :func:`find_images` without those in tar files in a folder.

    Args:
        root: Folder or tar file.
        endings: File name endings of images, with the dot; empty for timm's and the usual others.
    """
    wanted, root = _wanted(endings), os.fspath(root)
    folders: dict[str, list[bytes]] = {}
    skipped = 0
    with _name_root(root):
        if not os.path.isdir(root):  # noqa: PTH112 - os.scandir takes it from here
            listing = Listing.of_tar(root, _images_in_tar(root, wanted))
        else:
            for inside, names in _walk(root, '', ()):
                found = [name for name in names if _ending(name) in wanted]
                if found:
                    folders.setdefault(inside, []).append(pack(found, inside))
                skipped += sum(name[-4:].lower() == '.tar' for name in names)
            listing = Listing.of_folders(root, folders)
    if not listing:
        raise _no_images(root, skipped)
    return listing


def share_images(root: str | os.PathLike, endings: Collection[str], world: World) -> Listing:
    """Return what :func:`list_images` returns on rank 0, so that not every process searches a folder.

    A tar file is searched by every process: copies of it on several machines may have other places for an image.
    """
    if world.control is None or not Path(root).is_dir():
        return list_images(root, endings)
    own: Listing | None = None

    def search() -> Sequence[tuple[str, int]]:
        nonlocal own
        own = list_images(root, endings)
        return own.runs

    runs = agree(search, world)
    names = share_array(own.names if own else None, world)
    return own or Listing(os.fspath(root), names, runs)


def iterate_images(root: str | os.PathLike, tars: bool = False) -> Iterator[ImageFile]:
    """Yield the images of :func:`find_images` folder by folder, each folder and tar file in natural order.

    The names in one folder or in one tar file are in memory at a time.
    """
    wanted, root, empty, skipped = _wanted(()), os.fspath(root), True, 0
    with _name_root(root):
        if os.path.isdir(root):  # noqa: PTH112 - os.scandir takes it from here
            for name in (inside + name for inside, names in _walk(root, '', ()) for name in names):
                if _ending(name) in wanted:
                    yield ImageFile(root, name)
                elif _ending(name) == '.tar' and tars:
                    yield from Listing.of_tar(f'{root}/{name}', _images_in_tar(f'{root}/{name}', wanted))
                else:
                    skipped += _ending(name) == '.tar'
                    continue
                empty = False
        else:
            for image in Listing.of_tar(root, _images_in_tar(root, wanted)):
                yield image
                empty = False
    if empty:
        raise _no_images(root, skipped)


def _wanted(endings: Collection[str]) -> Collection[str]:
    return {ending.lower() for ending in endings} or ENDINGS | get_img_extensions(as_set=True)


@contextlib.contextmanager
def _name_root(root: str) -> Iterator[None]:
    try:
        yield
    except (OSError, tarfile.TarError) as error:
        place = getattr(error, 'filename', None) or root
        raise UserError(f'{place}: {getattr(error, "strerror", None) or first_line(error)}') from error


def _no_images(root: str, skipped: int) -> UserError:
    advice = f', but {skipped} tar files: name one of them, or use --dataset wds/NAME' if skipped else ''
    return UserError(f'{root}: no images in this {"folder" if Path(root).is_dir() else "tar file"}{advice}.')


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 - a Path for each of a million files is slow


def _walk(folder: str, inside: str, above: tuple[str, ...]) -> Iterator[tuple[str, list[str]]]:
    """Yield (path of a folder with a slash behind it, names of files in it that follow each other) in natural order.

    A link to a folder above it is not followed.
    """
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as entries:
        found = {entry.name: entry.is_dir() for entry in entries if not entry.name.startswith('.')}
    for is_folder, names in groupby(sorted(found, key=natural_key), found.__getitem__):
        if is_folder:
            for name in names:
                yield from _walk(f'{folder}/{name}', f'{inside}{name}/', (*above, real))
        else:
            yield inside, list(names)


def _images_in_tar(root: str, endings: Collection[str]) -> dict[str, tuple[int, int]]:
    """Return offset and size of the images in a tar file by name."""
    with open_regular(root) as file, tarfile.open(fileobj=file, mode='r:') as archive:
        found, lost = _places_in_tar(archive, endings)
    if lost:
        _logger.warning(f'{root}: left out {len(lost)} links that lead to no image in it, such as {lost[0]}; tar '
                        '--dereference stores what links lead to.')
    return found


def _places_in_tar(
        archive: tarfile.TarFile,
        endings: Collection[str],
        start: int = 0,
) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """Return offset and size of the images in an archive by name, and the links that lead to no image.

    Of members with the same name the last one counts, as it does for tar. ``start`` is the archive's own offset.
    """
    found: dict[str, tuple[int, int]] = {}
    links: dict[str, str] = {}
    for name, member in _members(archive):
        if member.islnk() or member.issym():
            folder = '' if member.islnk() else posixpath.dirname(name)
            links[name] = posixpath.normpath(posixpath.join(folder, member.linkname))
        elif _ending(name) == '.tar':
            with tarfile.open(fileobj=archive.extractfile(member), mode='r:') as inner:
                places, _ = _places_in_tar(inner, endings, start + member.offset_data)
            found |= {f'{name[:-len(".tar")]}/{each}': place for each, place in places.items()}
        elif _ending(name) in endings:
            found[name] = start + member.offset_data, member.size
    lost = []
    for name, target in links.items():
        for _ in range(MOST_LINKS):
            target = links.get(target, target)  # noqa: PLW2901 - a link to a link
        if target in found:
            found[name] = found[target]
        elif name not in found:
            lost.append(name)
    return found, lost


def _members(archive: tarfile.TarFile) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """Yield the files and links of an archive that are not hidden, by name."""
    for member in iterate_members(archive):
        name = posixpath.normpath(member.name)
        wanted = member.isfile() or member.islnk() or member.issym()
        if wanted and not any(part.startswith('.') for part in name.split('/')):
            yield name, member


class FolderReader(Reader):
    """timm's reader interface for class folders in a folder or a tar file.

    Args:
        root: Folder or tar file.
        class_to_idx: Numbers of the network's classes by name; None to number the classes that are found.
        class_map: True if ``class_to_idx`` also selects: images of other classes are left out. Otherwise they are an
            error.
        endings: File name endings of images; empty for the usual ones.
        world: This process among all, which construct the reader together; None for a reader of its own.

    Attributes:
        class_to_idx: Numbers of the classes by name.

    Raises:
        UserError: No images, images outside of class folders, an empty class folder, classes that merge, or a class
            that the network does not know.
    """

    def __init__(
            self,
            root: str | os.PathLike,
            class_to_idx: Mapping[str, int] | None = None,
            class_map: bool = False,
            endings: Collection[str] = (),
            world: World | None = None,
    ):
        super().__init__()
        self.root = os.fspath(root)
        images = share_images(root, endings, world or World())
        folders = [folder[:-1] for folder, _ in images.runs]
        try:
            found = number_classes({folder for folder in folders if folder or not class_map})
            if class_to_idx is None:
                _check_no_class_is_empty(Path(root), {folder.partition('/')[0] for folder in folders})
            elif not class_map:
                map_classes(found, class_to_idx)
        except UserError as error:
            raise UserError(f'{self.root}: {error}') from None
        self.class_to_idx = dict(found if class_to_idx is None else class_to_idx)
        numbers = [self.class_to_idx.get(clean_name(folder.rpartition('/')[2])) for folder in folders]
        counts = [count for _, count in images.runs]
        chosen = np.repeat([number is not None for number in numbers], counts)
        self.images = images.select(chosen)
        self._targets = np.repeat(np.array([number or 0 for number in numbers], np.int32), counts)[chosen]
        if not self.images:
            raise UserError(f'{self.root}: none of its {len(images)} images is of a class of the class map.')

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        return self.images[index].open(), int(self._targets[index])

    def __len__(self) -> int:
        return len(self.images)

    def hash_names(self) -> str:
        """Return the SHA-256 of the names of the images with a NUL between them."""
        return self.images.hash_names()

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        image = self.images[index]
        if basename:
            return image.name.rpartition('/')[2]
        return image.path if absolute else image.name


def _check_no_class_is_empty(root: Path, filled: Collection[str]) -> None:
    """Raise UserError for a class folder without images: the classes behind it would have other numbers."""
    empty = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith('.')
                   and path.name not in filled) if root.is_dir() else []
    if empty:
        others = f' (nor do {len(empty) - 1} more)' if len(empty) > 1 else ''
        raise UserError(f"class folder '{root / empty[0]}' holds no image{others}: fill it, or remove it, in all "
                        'splits alike.')
