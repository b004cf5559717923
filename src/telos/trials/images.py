"""Images: a folder with one folder per class, or an array of pixels, as tensors of one size."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from telos.trials._words import UsageError
from telos.trials.splits import ROWS_OF_A_CLASS

T = TypeVar("T")
FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
GREY = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "I;16N")
SIDE = 32  # of images that are not all of one size, or larger than LARGEST_SIDE
LARGEST_SIDE = 64
LARGEST = 4e9  # bytes of all pixels as float32


@dataclass(eq=False)
class Images:
    """Pixels and classes; images of a test folder stand at the end.

    Attributes:
        name: of the folder or file.
        pixels: (N, channels, height, width), uint8 or float32.
        target: (N,) int64 classes, or float64 numbers.
        classes: their names, or ``None`` for numbers.
        main: how many images are not from a test folder.
        notices: sentences.
    """

    name: str
    pixels: np.ndarray
    target: np.ndarray
    classes: tuple[str, ...] | None
    main: int
    notices: tuple[str, ...] = ()
    groups: np.ndarray | None = None
    time: np.ndarray | None = None
    columns: tuple[dict[str, Any], ...] = ()
    images = True

    @property
    def what(self) -> str:
        """The images in words."""
        channels, height, width = self.pixels.shape[1:]
        colour = {1: "a grey", 3: "a colour"}.get(channels, f"a {channels}-channel")
        return f"{colour} image of {height} x {width} pixels"

    def preprocess(self, train: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        """Mean 0 and deviation 1 in every channel of the training images."""
        channels = self.pixels.shape[1]
        total, square, count = np.zeros(channels), np.zeros(channels), 0
        # some images at a time: all of them in double precision may not fit
        for rows in np.array_split(train, len(train) // 1024 + 1):
            part = self.pixels[rows].astype(np.float64)
            total += part.sum((0, 2, 3))
            square += np.square(part).sum((0, 2, 3))
            count += part.size // channels
        average = total / count
        deviation = np.sqrt(np.maximum(square / count - average**2, 0))
        mean = average.astype(np.float32).reshape(-1, 1, 1)
        scale = np.where(deviation > 0, deviation, 1).astype(np.float32).reshape(-1, 1, 1)

        def features(rows: np.ndarray) -> np.ndarray:
            found = self.pixels[rows].astype(np.float32)
            found -= mean
            found /= scale
            return found

        return features

    def leaks(self) -> list[str]:
        """Images have no columns that could give the class away."""
        return []


def read_folder(folder: Path, size: int | None = None, test: Path | None = None) -> Images:
    """Read ``class/name.png`` below a folder.

    Args:
        folder: holds one folder for each class.
        size: height and width to which all images are resized.
        test: a folder of the same kind, whose images are only tested on.

    Raises:
        telos.trials.UsageError: for no classes, a class with too few images, or images of no known format.
    """
    notices: list[str] = []
    names = _classes(folder)
    found = [_Picture(label, path) for label in names for path in _files(folder / label)]
    if empty := sorted(set(names) - {picture.label for picture in found}):
        notices.append(f"folders of {folder.name} without an image are left out: {', '.join(empty)}")
    held: list[_Picture] = []
    if test is not None:
        if other := sorted(set(_classes(test)) - set(names)):
            notices.append(
                f"classes of {test.name} that {folder.name} has not are left out: {', '.join(other)}"
            )
        held = [_Picture(label, path) for label in names for path in _files(test / label)]
    shape, grey = _common(chain(found, held), size, notices)
    if len(found + held) * (1 if grey else 3) * shape[0] * shape[1] * 4 > LARGEST:
        raise UsageError(
            f"{len(found + held):,} images of {shape[0]}x{shape[1]} pixels take more than 4 GB; set size="
        )
    lost: list[_Picture] = []
    pixels, labels = _read(found, shape, grey, lost)
    counts = Counter(labels)
    if len(counts) < 2:
        raise UsageError(
            f"{folder} holds images of one class only" if counts else f"{folder} holds no images"
        )
    need = ROWS_OF_A_CLASS if test is None else 2
    for label, count in sorted(counts.items()):
        if count < need:
            raise UsageError(
                f"class {label!r} of {folder} has {count} image{'s' if count > 1 else ''} and needs {need} "
                "to be in every split"
            )
    main = len(pixels)
    if test is not None:
        more, more_labels = _read([one for one in held if one.label in counts], shape, grey, lost)
        if not more:
            raise UsageError(f"{test} has no image to test on")
        pixels, labels = pixels + more, labels + more_labels
    if lost:
        shown = ", ".join(str(Path(one.label) / one.path.name) for one in lost[:5])
        shown += f" and {len(lost) - 5} more" if len(lost) > 5 else ""
        notices.append(f"images that cannot be read are left out: {shown}")
    classes = tuple(sorted(counts))
    target = np.array([classes.index(label) for label in labels], dtype=np.int64)
    stacked = np.stack(pixels)
    _note_copies(stacked, notices)
    return Images(folder.name, stacked, target, classes, main, tuple(notices))


def from_arrays(
    name: str,
    pixels: np.ndarray,
    target: np.ndarray,
    classes: tuple[str, ...] | None,
    main: int,
    notices: list[str],
) -> Images:
    """Images from an array (N, H, W), (N, H, W, C) or (N, C, H, W)."""
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    elif pixels.shape[-1] in (1, 3, 4) and pixels.shape[1] not in (1, 3, 4):
        pixels = pixels.transpose(0, 3, 1, 2)
    if pixels.size * 4 > LARGEST:
        raise UsageError(
            f"the images of {name} would take {pixels.size * 4 / 1e9:.1f} GB; store smaller ones"
        )
    if pixels.dtype != np.uint8:
        pixels = pixels.astype(np.float32)
    _note_copies(pixels, notices)
    return Images(name, np.ascontiguousarray(pixels), target, classes, main, tuple(notices))


def image_files(folder: Path) -> list[Path]:
    """Every file below a folder that would be read, in order."""
    return [path for name in _classes(folder) for path in _files(folder / name)]


def _classes(folder: Path) -> list[str]:
    try:
        found = sorted(
            path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
        )
    except OSError as error:
        raise UsageError(f"{folder} cannot be read: {error.strerror}") from error
    if {"train", "test"} <= set(found) and not any(map(_files, (folder / "train", folder / "test"))):
        raise UsageError(
            f"{folder} holds the folders train and test: name them as {folder / 'train'} test={folder / 'test'}"
        )
    if not found:
        raise UsageError(
            f"{folder} holds no folders; an image folder has one for each class (class/name.png)"
        )
    return found


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in FORMATS and not path.name.startswith(".") and path.is_file()
    )


def _common(
    pictures: Iterable[_Picture], size: int | None, notices: list[str]
) -> tuple[tuple[int, int], bool]:
    """Height and width to read all images with, and whether all are grey; only their headers are read."""
    shapes: Counter[tuple[int, int]] = Counter()
    grey = True
    for picture in pictures:
        facts = picture.facts()
        if facts is not None:
            shapes[facts[0]] += 1
            grey = grey and facts[1]
    shape = next(iter(shapes), (SIDE, SIDE))
    if size is not None:
        shape = (size, size)
    elif len(shapes) > 1 or max(shape) > LARGEST_SIDE:
        shape = (SIDE, SIDE)
    if set(shapes) - {shape}:
        ends = [f"{height}x{width}" for height, width in (min(shapes), max(shapes))]
        sizes = " to ".join(dict.fromkeys(ends))
        notices.append(
            f"images of {sizes} pixels are resized to {shape[0]}x{shape[1]}; size= sets another size"
        )
    return shape, grey


def _read(
    pictures: Iterable[_Picture], shape: tuple[int, int], grey: bool, lost: list[_Picture]
) -> tuple[list[np.ndarray], list[str]]:
    """Pixels (channels, height, width) and classes of the images that can be read; the others are ``lost``."""
    pixels, labels = [], []
    for picture in pictures:
        found = picture.pixels(shape, grey)
        if found is None:
            lost.append(picture)
        else:
            pixels.append(found)
            labels.append(picture.label)
    return pixels, labels


@dataclass(frozen=True)
class _Picture:
    """A file that should be an image of a class."""

    label: str
    path: Path

    def facts(self) -> tuple[tuple[int, int], bool] | None:
        """Height and width, and whether it is grey, from the header; ``None`` where that cannot be read."""

        def look(image: Any) -> tuple[tuple[int, int], bool]:
            turned = image.getexif().get(0x0112, 1) >= 5  # lies on its side
            return image.size if turned else image.size[::-1], image.mode in GREY

        return self._opened(look)

    def pixels(self, shape: tuple[int, int], grey: bool) -> np.ndarray | None:
        """The image (channels, height, width) in 8 bits, or ``None`` where it cannot be read."""
        from PIL import Image, ImageOps

        def read(image: Any) -> np.ndarray:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits
                image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
            image = image.convert("L" if grey else "RGB")
            if image.size != shape[::-1]:
                image = image.resize(shape[::-1], Image.Resampling.BILINEAR)
            return np.atleast_3d(np.asarray(image, dtype=np.uint8)).transpose(2, 0, 1)

        return self._opened(read)

    def _opened(self, use: Callable[[Any], T]) -> T | None:
        from PIL import Image

        try:
            # only the formats of pictures: some others would start programs
            with Image.open(self.path, formats=sorted(set(FORMATS.values()))) as image:
                return use(image)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            return None


def _note_copies(pixels: np.ndarray, notices: list[str]) -> None:
    different = len({hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in pixels})
    if different < len(pixels):
        notices.append(
            f"images that are exact copies of another: {len(pixels) - different:,} of {len(pixels):,}; "
            "copies may fall into different splits"
        )
