"""Images in folders and tar files, found in one way by training, evaluation, inference and calibration."""

import io
import logging
import os
import posixpath
import tarfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from timm.data.readers.img_extensions import get_img_extensions
from timm.data.readers.reader import Reader

from ..errors import UserError, first_line
from .classes import clean_name, map_classes, natural_key, number_classes

__all__ = ['ENDINGS', 'FolderReader', 'ImageFile', 'find_images', 'iterate_images']

_logger = logging.getLogger(__name__)

# Besides timm's: what Pillow reads.
ENDINGS = frozenset('.bmp .gif .j2k .jfif .jp2 .jpe .mpo .pbm .pgm .png .pnm .ppm .tif .tiff .webp'.split())

MOST_LINKS = 40  # from one to the next, as in Linux


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image in a folder, or in a tar file.

    Attributes:
        root: Folder or tar file.
        name: Path within it, with slashes; a tar within a tar counts as a folder.
        offset: Place of its bytes in the tar file; -1 in a folder.
        size: Number of its bytes in the tar file.
    """

    root: str
    name: str
    offset: int = -1
    size: int = 0

    @property
    def path(self) -> str:
        """Path of the file, or of the tar file and within it."""
        return self.name if self.root == '.' else f'{self.root}/{self.name}'

    @property
    def folder(self) -> str:
        """Folder within the root; empty for the root itself."""
        return self.name.rpartition('/')[0]

    def open(self) -> BinaryIO:
        """Open it for reading. Threads and processes can do so at the same time, even within one tar file."""
        if self.offset < 0:
            return open(self.path, 'rb')  # noqa: PTH123 - a Path for each of a million images is slow
        with open(self.root, 'rb') as file:  # noqa: PTH123
            file.seek(self.offset)
            return io.BytesIO(file.read(self.size))


def find_images(root: str | os.PathLike, endings: Collection[str] = (), tars: bool = False) -> list[ImageFile]:
    """Return the images in a folder, or in a tar file, however deep, in natural order.

    Symbolic links are followed. Hidden files and folders, whose names start with a dot, are left out.

    Args:
        root: Folder or tar file.
        endings: File name endings of images, with the dot; empty for timm's and the usual others.
        tars: Search tar files in folders, too.

    Raises:
        UserError: No such folder or file, no images in it, or a tar file that cannot be read.
    """
    return sorted(iterate_images(root, endings, tars), key=lambda image: natural_key(image.name))


def iterate_images(root: str | os.PathLike, endings: Collection[str] = (), tars: bool = False) -> Iterator[ImageFile]:
    """Yield the images of :func:`find_images` folder by folder, each folder and tar file in natural order.

    The names in one folder or in one tar file are in memory at a time.
    """
    wanted = {ending.lower() for ending in endings} or ENDINGS | get_img_extensions(as_set=True)
    root, empty, skipped = os.fspath(root), True, 0
    try:
        if os.path.isdir(root):  # noqa: PTH112 - os.scandir takes it from here
            for name in _walk(root, '', ()):
                if _ending(name) in wanted:
                    yield ImageFile(root, name)
                elif _ending(name) == '.tar' and tars:
                    yield from _images_in_tar(f'{root}/{name}', wanted)
                else:
                    skipped += _ending(name) == '.tar'
                    continue
                empty = False
        else:
            for image in _images_in_tar(root, wanted):
                yield image
                empty = False
    except (OSError, tarfile.TarError) as error:
        raise UserError(f'{root}: {getattr(error, "strerror", None) or first_line(error)}') from error
    if empty:
        advice = f', but {skipped} tar files: name one of them, or use --dataset wds/NAME' if skipped else ''
        raise UserError(f'{root}: no images in this {"folder" if Path(root).is_dir() else "tar file"}{advice}.')


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 - a Path for each of a million files is slow


def _walk(folder: str, inside: str, above: tuple[str, ...]) -> Iterator[str]:
    """Yield the paths of all files within a folder. A link to a folder above it is not followed."""
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as entries:
        found = [(entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith('.')]
    for name, is_folder in sorted(found, key=lambda each: natural_key(each[0])):
        if is_folder:
            yield from _walk(f'{folder}/{name}', f'{inside}{name}/', (*above, real))
        else:
            yield inside + name


def _images_in_tar(root: str, endings: Collection[str]) -> Iterator[ImageFile]:
    with tarfile.open(root, 'r:') as archive:
        found, lost = _places_in_tar(archive, endings)
    if lost:
        _logger.warning(f'{root}: left out {len(lost)} links that lead to no image in it, such as {lost[0]}; tar '
                        '--dereference stores what links lead to.')
    for name in sorted(found, key=natural_key):
        yield ImageFile(root, name, *found[name])


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
    """Yield the files and links of an archive, which keeps none of them in memory."""
    while (member := archive.next()) is not None:
        archive.members = []  # type: ignore[attr-defined]  # the stubs do not name it
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
    ):
        super().__init__()
        self.root = os.fspath(root)
        images = find_images(root, endings)
        try:
            found = number_classes({image.folder for image in images if image.folder or not class_map})
            if class_to_idx is None:
                _check_no_class_is_empty(Path(root), {image.folder.partition('/')[0] for image in images})
            elif not class_map:
                map_classes(found, class_to_idx)
        except UserError as error:
            raise UserError(f'{self.root}: {error}') from None
        self.class_to_idx = dict(found if class_to_idx is None else class_to_idx)
        numbered = ((image, self.class_to_idx.get(clean_name(image.folder.rpartition('/')[2]))) for image in images)
        self.samples = [(image, target) for image, target in numbered if target is not None]
        if not self.samples:
            raise UserError(f'{self.root}: none of its {len(images)} images is of a class of the class map.')

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        image, target = self.samples[index]
        return image.open(), target

    def __len__(self) -> int:
        return len(self.samples)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        image = self.samples[index][0]
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
