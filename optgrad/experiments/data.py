"""MNIST, Fashion-MNIST, CIFAR-10, CIFAR-100 and scikit-learn's digits as arrays of bytes.

``load(name)`` returns a :class:`Dataset`. The official files are parsed directly (idx and the
*binary* CIFAR formats; nothing is ever unpickled) and are looked for in this order:

1. the argument ``data_dir``,
2. the folder that the environment variable ``OPTGRAD_DATA_DIR`` names,
3. the user cache, ``pooch.os_cache("optgrad")``,
4. the data set's mirrors, from which they are downloaded into the user cache, each archive
   checked by its SHA-256.

In each folder the files may lie in the data set's own folder (``mnist/``, ``fashion_mnist/`` or
``fashion-mnist/``, ``cifar-10-batches-bin/``, ``cifar-100-binary/``) or directly in it; idx files
may be gzip-compressed or not. Files that are already unpacked are checked by size, header, label
range and number of images per class, because their wrappers' digests cannot apply to them.

The environment variable ``OPTGRAD_MIRRORS`` (URLs separated by blanks) replaces the built-in
mirrors; see :func:`load`.
"""

import dataclasses
import functools
import gzip
import importlib.util
import math
import os
import shutil
import struct
import tarfile
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from optgrad.core.checks import check_one_of

Images = npt.NDArray[np.uint8]  # [N, H, W, C]
Labels = npt.NDArray[np.int32]  # [N]


class DataError(ValueError):
    """A data file is truncated, corrupt or mislabelled; the message names it."""


class DataNotFoundError(DataError, FileNotFoundError):
    """A data set is in none of the places and could not be downloaded; the message lists them."""


# The data set in memory -----------------------------------------------------------------------


class Examples(NamedTuple):
    """Images and their labels."""

    images: Images  # raw pixels, uint8 [N, H, W, C]
    labels: Labels  # int32 [N]


def _none_yet() -> Any:
    return np.empty(0, np.uint8)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Training, validation and test images with their labels, read-only.

    The validation set is empty until :meth:`split_validation` takes it out of the training set.
    Pixels are as the official files have them: 0 to 255, but 0 to 16 in "digits".

    Attributes:
      name: the data set's name.
      train_images: uint8 [N, H, W, C].
      train_labels: int32 [N], in [0, num_classes).
      test_images: uint8 [M, H, W, C].
      test_labels: int32 [M].
      classes: the names of the classes, in the order of the labels.
      validation_images: uint8 [V, H, W, C], V = 0 until split.
      validation_labels: int32 [V].

    Raises:
      ValueError: if shapes, dtypes or labels do not fit together.
    """

    name: str
    train_images: Images
    train_labels: Labels
    test_images: Images
    test_labels: Labels
    classes: tuple[str, ...]
    validation_images: Images = dataclasses.field(default_factory=_none_yet)
    validation_labels: Labels = dataclasses.field(default_factory=_none_yet)

    def __post_init__(self) -> None:
        if not len(self.validation_images):
            object.__setattr__(self, "validation_images", self.train_images[:0])
            object.__setattr__(self, "validation_labels", self.train_labels[:0])
        if self.train_images.ndim != 4:
            shape = self.train_images.shape
            raise ValueError(f"train_images has shape {shape}; accepted: [N, H, W, C]")
        for part in ("train", "validation", "test"):
            self._check_part(part)
            for field in (f"{part}_images", f"{part}_labels"):
                # A view: a split shares memory with its source, so neither may be written to,
                # while the caller's own array stays as it was.
                view = getattr(self, field).view()
                view.flags.writeable = False
                object.__setattr__(self, field, view)

    def _check_part(self, part: str) -> None:
        images, labels = getattr(self, f"{part}_images"), getattr(self, f"{part}_labels")
        if images.dtype != np.uint8 or images.shape[1:] != self.image_shape:
            raise ValueError(
                f"{part}_images is {images.dtype} {images.shape}; "
                f"accepted: uint8 (N, {', '.join(map(str, self.image_shape))})"
            )
        if labels.dtype != np.int32 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"{part}_labels is {labels.dtype} {labels.shape}; accepted: int32 ({len(images)},)"
            )
        if len(labels) and not 0 <= labels.min() <= labels.max() < self.num_classes:
            raise ValueError(
                f"{part}_labels has values from {labels.min()} to {labels.max()}; "
                f"accepted: 0 to {self.num_classes - 1}"
            )

    def __repr__(self) -> str:
        sizes = ", ".join(
            f"{len(getattr(self, part).labels):,} {part}"
            for part in ("train", "validation", "test")
        )
        return f"Dataset({self.name!r}: {sizes}, {self.image_shape}, {self.num_classes} classes)"

    @property
    def train(self) -> Examples:
        """The training set."""
        return Examples(self.train_images, self.train_labels)

    @property
    def validation(self) -> Examples:
        """The validation set, empty before :meth:`split_validation`."""
        return Examples(self.validation_images, self.validation_labels)

    @property
    def test(self) -> Examples:
        """The test set."""
        return Examples(self.test_images, self.test_labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of every image."""
        height, width, channels = self.train_images.shape[1:]
        return height, width, channels

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def mean(self) -> npt.NDArray[np.float32]:
        """Mean of the training pixels per channel, in raw pixel units, float32 (C,)."""
        return self._mean_and_std[0]

    @property
    def std(self) -> npt.NDArray[np.float32]:
        """Standard deviation of the training pixels per channel, in raw pixel units, float32 (C,).

        It is 1 for a constant channel, so that ``(x - mean) / std`` is never NaN.
        """
        return self._mean_and_std[1]

    @functools.cached_property
    def _mean_and_std(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        # Exact, and without a float copy of the images: a byte has 256 values, so a histogram
        # holds all there is to know. The chunks bound what bincount widens to 64 bits.
        channels = self.image_shape[-1]
        histogram = np.zeros((channels, 256))
        for start in range(0, len(self.train_images), 1000):
            chunk = self.train_images[start : start + 1000]
            for channel in range(channels):
                histogram[channel] += np.bincount(chunk[..., channel].ravel(), minlength=256)
        weight = histogram / max(histogram[0].sum(), 1.0)
        value = np.arange(256.0)
        mean = weight @ value
        std = np.sqrt(np.sum(weight * (value - mean[:, None]) ** 2, axis=1))
        return mean.astype(np.float32), np.where(std > 0, std, 1.0).astype(np.float32)

    def split_validation(self, size: int | float, seed: int = 0) -> "Dataset":
        """Moves training examples into the validation set, the same share of every class.

        The same size and seed give the same split on every machine and NumPy version. Both parts
        keep the order of the training set. ``mean`` and ``std`` of the result are those of the
        training examples that remain.

        Args:
          size: how many training examples (an integer from 1 to N - 1) or which fraction of them
            (a float in (0, 1), rounded to a whole number of examples).
          seed: which examples; an integer in [0, 2**32).

        Returns:
          A new data set; the test set is the same.

        Raises:
          TypeError: if ``size`` or ``seed`` is not such a number.
          ValueError: if ``size`` or ``seed`` is out of range, or there is a validation set already.
        """
        if len(self.validation_labels):
            raise ValueError(
                f"{self.name} has a validation set of {len(self.validation_labels)} examples "
                "already; accepted: a data set without one"
            )
        count = _split_size(size, len(self.train_labels))
        chosen = _stratified_choice(self.train_labels, count, self.num_classes, seed)
        return dataclasses.replace(
            self,
            train_images=self.train_images[~chosen],
            train_labels=self.train_labels[~chosen],
            validation_images=self.train_images[chosen],
            validation_labels=self.train_labels[chosen],
        )


def _split_size(size: Any, total: int) -> int:
    accepted = f"accepted: an integer from 1 to {total - 1} or a fraction in (0, 1)"
    if isinstance(size, bool) or not isinstance(size, int | float | np.integer | np.floating):
        raise TypeError(f"size = {size!r} is not a number; {accepted}")
    whole = isinstance(size, int | np.integer)
    if not whole and not 0 < size < 1:
        raise ValueError(f"size = {size} is not a possible fraction; {accepted}")
    count = int(size) if whole else round(size * total)
    if not 1 <= count <= total - 1:
        raise ValueError(f"size = {size} is {count} of {total} training examples; {accepted}")
    return count


def _stratified_choice(
    labels: Labels, count: int, num_classes: int, seed: Any
) -> npt.NDArray[np.bool_]:
    """Chooses ``count`` of N examples, from each class its share; a mask, bool [N].

    Shares that are no whole numbers are rounded by largest remainder, ties at random.
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise TypeError(f"seed = {seed!r} is not an integer; accepted: 0 to 2**32 - 1")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed = {seed} is out of range; accepted: 0 to 2**32 - 1")
    # RandomState and not default_rng: NumPy promises to keep its stream across versions.
    random = np.random.RandomState(int(seed))
    sizes = np.bincount(labels, minlength=num_classes).astype(np.int64)
    quota, remainder = np.divmod(sizes * count, len(labels))
    largest_first = np.lexsort((random.permutation(num_classes), -remainder))
    quota[largest_first[: count - quota.sum()]] += 1
    chosen = np.zeros(len(labels), np.bool_)
    for label, taken in enumerate(quota):
        members = np.flatnonzero(labels == label)
        chosen[random.permutation(members)[:taken]] = True
    return chosen


# What each data set consists of ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Part:
    """The training or the test set as the official files have it."""

    title: str  # "training" or "test"
    files: tuple[str, ...]  # idx: images, labels; CIFAR: batches of equal size
    per_class: tuple[int, ...]  # number of images of each class

    @property
    def count(self) -> int:
        """Number of images."""
        return sum(self.per_class)


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where a data set's files lie, what they must hold and where to get them."""

    name: str
    folders: tuple[str, ...]  # accepted names of its folder; the first is written
    train: _Part
    test: _Part
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    read: Callable[["_Source", Mapping[str, Path]], Dataset]  # from the paths of its files
    archives: Mapping[str, str]  # file name at the mirrors: SHA-256
    mirrors: tuple[str, ...]
    label_bytes: int = 1  # CIFAR: bytes before the pixels of a record; the last is the class

    @property
    def files(self) -> tuple[str, ...]:
        return self.train.files + self.test.files

    @property
    def record_bytes(self) -> int:
        """Bytes of one CIFAR record."""
        return self.label_bytes + math.prod(self.image_shape)


def datasets() -> tuple[str, ...]:
    """The names that :func:`load` accepts.

    Examples:
      >>> datasets()
      ('digits', 'mnist', 'fashion_mnist', 'cifar10', 'cifar100')
    """
    return ("digits", *_SOURCES)


def load(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    download: bool = True,
    mirrors: Sequence[str] | None = None,
) -> Dataset:
    """Loads a data set; the module's docstring says where its files are looked for.

    "cifar100" has the 100 fine labels. "digits" is scikit-learn's set of 1,797 images of 8x8
    pixels, split here into 1,437 for training and 360 for testing, the same share of every class;
    it needs no files, and the other arguments do not matter to it.

    Args:
      name: "digits", "mnist", "fashion_mnist", "cifar10" or "cifar100".
      data_dir: a folder with the official files, in any layout that the module's docstring names.
        If they are not there, a warning says so and the search goes on.
      download: whether files that are in none of the places may be downloaded. The CIFAR archives
        are unpacked into the user cache and then removed.
      mirrors: http(s) URLs of folders with the official archives, tried in order in place of the
        built-in ones. "{name}" in a URL stands for the data set's name. By default the URLs in
        the environment variable OPTGRAD_MIRRORS, if it is set, and else the built-in ones.

    Returns:
      The data set, without a validation set.

    Raises:
      ValueError: for an unknown name (the message suggests the nearest) or an unusable mirror.
      DataError: for a file that is truncated, corrupt or mislabelled.
      DataNotFoundError: if the files are in none of the places and could not be downloaded.
      ImportError: if pooch or scikit-learn is needed and not installed.

    Examples:
      >>> load("digits")
      Dataset('digits': 1,437 train, 0 validation, 360 test, (8, 8, 1), 10 classes)
    """
    check_one_of("name", name, datasets())
    if name == "digits":
        return _load_digits()
    source = _SOURCES[name]
    if mirrors is not None:
        _mirror_urls(source, mirrors)  # refused even where the files are at hand
    misses: list[str] = []
    found = _find(source, data_dir, misses)
    if found is None:
        urls = _mirror_urls(source, mirrors) if download else ()
        found = _download(source, user_cache(), urls, misses)
    if data_dir is not None and misses:  # data_dir is the first place, so it was the first miss
        folder = next(iter(found.values())).parent
        warnings.warn(f"{name} is not in {misses[0]}; using {folder}", stacklevel=2)
    return source.read(source, found)


# Finding the files ----------------------------------------------------------------------------


def whereabouts(name: str, data_dir: str | os.PathLike[str] | None = None) -> Path | str | None:
    """The folder that `load` would read a data set from; None if it would download it."""
    if name == "digits":
        return "within scikit-learn"
    found = _find(_SOURCES[name], data_dir, [])
    return next(iter(found.values())).parent if found else None


def user_cache() -> Path:
    """Where downloads are kept."""
    return Path(_import_extra("pooch").os_cache("optgrad"))


def _find(
    source: _Source, data_dir: str | os.PathLike[str] | None, misses: list[str]
) -> dict[str, Path] | None:
    """The paths of a data set's files in the first place that has them; adds why others do not."""
    for title, place in _places(data_dir):
        found = _files_in(place, source)
        if not isinstance(found, str):
            return found
        misses.append(f"{title} {place}: {found}")
    return None


def _places(data_dir: str | os.PathLike[str] | None) -> Iterator[tuple[str, Path]]:
    """What to call each place, and its path; lazily, as only the last one needs pooch."""
    if data_dir is not None:
        yield "data_dir", Path(data_dir).expanduser()
    if from_environment := os.environ.get("OPTGRAD_DATA_DIR"):
        yield "$OPTGRAD_DATA_DIR", Path(from_environment).expanduser()
    yield "user cache", user_cache()


def _import_extra(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{module.partition('.')[0]} is not installed; it is needed to load and to download "
            'data sets: pip install "optgrad[experiments]"'
        ) from error


def _files_in(place: Path, source: _Source) -> dict[str, Path] | str:
    """The paths of a data set's files in a folder; otherwise says why they are not there."""
    if not place.is_dir():
        return "no such folder"
    incomplete = ""
    for folder in (*(place / name for name in source.folders), place):
        # CIFAR's binary files come in a tar archive and have no gzip-compressed layout.
        suffixes = ("",) if source.read is _read_cifar else ("", ".gz")
        found = {
            name: next(
                (path for end in suffixes if (path := folder / f"{name}{end}").is_file()), None
            )
            for name in source.files
        }
        files = {name: path for name, path in found.items() if path is not None}
        if len(files) == len(found):
            return files
        if files and not incomplete:
            missing = ", ".join(name for name in found if name not in files)
            incomplete = f"{folder} lacks {missing}"
    return incomplete or f"none of {', '.join(source.files)} there or in {_listed(source.folders)}"


def _listed(folders: Sequence[str]) -> str:
    return " or ".join(f"{folder}/" for folder in folders)


# Downloading ----------------------------------------------------------------------------------

_ATTEMPTS = 3  # at each mirror, unless it refuses for good
_WAIT = 1.0  # seconds before the second attempt; twice that before the third
_TIMEOUT = (10.0, 60.0)  # seconds to connect, and between two pieces of an answer


def _mirror_urls(source: _Source, mirrors: Sequence[str] | None) -> tuple[str, ...]:
    """The folders to download from, each ending in a slash."""
    if mirrors is None:
        argument = "OPTGRAD_MIRRORS"
        mirrors = os.environ.get(argument, "").split() or source.mirrors
    else:
        argument = "mirrors"
        mirrors = (mirrors,) if isinstance(mirrors, str) else tuple(mirrors)
    accepted = "accepted: one or more URLs that start with https:// or http://"
    if not mirrors:
        raise ValueError(f"{argument} = {mirrors!r} is empty; {accepted}")
    for url in mirrors:
        if not url.startswith(("https://", "http://")):
            raise ValueError(f"{argument} has the URL {url!r}; {accepted}")
    return tuple(url.replace("{name}", source.name).rstrip("/") + "/" for url in mirrors)


def _download(
    source: _Source, cache: Path, urls: Sequence[str], misses: Sequence[str]
) -> dict[str, Path]:
    """Downloads a data set into the user cache and returns the paths of its files.

    Args:
      source: the data set.
      cache: the user cache.
      urls: the mirrors, ending in a slash; none if downloads are not allowed.
      misses: where else it was looked for, for the message.

    Raises:
      DataNotFoundError: if that fails.
    """
    problems: list[str] = []
    folder = cache / source.folders[0]
    try:
        for archive, digest in source.archives.items() if urls else ():
            cache.mkdir(parents=True, exist_ok=True)
            # Private to this process, so that two that download at once do not meet, and
            # removed whatever happens; only whole and checked files leave it, by a rename.
            with tempfile.TemporaryDirectory(prefix=".download-", dir=cache) as private:
                path = _fetch(archive, digest, urls, Path(private), problems)
                if path is None:
                    break
                if archive.endswith(".tar.gz"):
                    _extract(path, source, folder)
                else:
                    folder.mkdir(exist_ok=True)
                    path.replace(folder / archive)
    except OSError as error:  # a full disk, a folder that may not be written to
        problems.append(f"{cache}: {error}")
    found = _files_in(cache, source)
    if not isinstance(found, str):
        return found
    raise DataNotFoundError(_not_found_message(source, misses, problems, allowed=bool(urls)))


def _not_found_message(
    source: _Source, misses: Sequence[str], problems: Sequence[str], allowed: bool
) -> str:
    return "\n".join(
        (
            f"{source.name} was not found. Places looked at:",
            *(f"  {miss}" for miss in misses),
            "Downloads tried:" if allowed else "Downloads tried: none (download=False)",
            *(f"  {problem}" for problem in problems),
            f"To provide the files, put {', '.join(source.files)} (unpacked from the official "
            f"{', '.join(source.archives)}) into a folder {_listed(source.folders)} and pass the "
            "folder above it as data_dir or in the environment variable OPTGRAD_DATA_DIR; or "
            "name a mirror in OPTGRAD_MIRRORS.",
        )
    )


def _fetch(
    archive: str, digest: str, urls: Sequence[str], folder: Path, problems: list[str]
) -> Path | None:
    """Downloads one archive into a folder; ``None``, with the reasons added, if no mirror can.

    After a broken connection it goes on where that ended. What a server that begins anew, or lies
    about where it goes on, makes of it has a wrong digest, and is fetched as a whole again.
    """
    pooch = _import_extra("pooch")
    arrived = folder / "arrived"

    def download(url: str, output: str, caller: Any) -> None:
        # Some servers declare a .gz file as gzip *encoding*; it would arrive decompressed then.
        headers = {"Accept-Encoding": "identity"}
        if beginning := _size(arrived):
            headers["Range"] = f"bytes={beginning}-"
        with_bar = importlib.util.find_spec("tqdm") is not None
        get = pooch.HTTPDownloader(progressbar=with_bar, timeout=_TIMEOUT, headers=headers)
        with open(arrived, "ab") as file:
            get(url, file, caller)
        arrived.replace(output)

    for url in urls:
        for attempt in range(_ATTEMPTS):
            time.sleep(_WAIT * attempt)
            goes_on = _size(arrived) > 0
            try:
                return Path(
                    pooch.retrieve(
                        url + archive, digest, fname=archive, path=folder, downloader=download
                    )
                )
            except (OSError, ValueError) as error:
                reason = str(error)
                if _is_final(error):
                    arrived.unlink(missing_ok=True)
                    if not goes_on:
                        break
        arrived.unlink(missing_ok=True)
        problems.append(f"{url}{archive}: {reason}")
    return None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _is_final(error: Exception) -> bool:
    """Whether another attempt at the same mirror is pointless."""
    requests_errors = _import_extra("requests.exceptions")  # what pooch downloads with
    if isinstance(error, requests_errors.HTTPError):
        return bool(error.response.status_code < 500)  # such as 404
    if isinstance(error, requests_errors.ConnectTimeout):
        return True  # it would take as long again
    return not isinstance(error, OSError)  # a wrong digest: the mirror has other files


def _extract(archive: Path, source: _Source, folder: Path) -> None:
    """Unpacks the files of a CIFAR archive into a folder, each renamed to its name when whole.

    Only plain files of the expected names and sizes are read, and they are written under names
    that come from ``source``: nothing in the archive can choose where or how much is written.

    Raises:
      DataError: if the archive is damaged or lacks a file.
    """
    sizes = {
        f"{source.folders[0]}/{name}": part.count // len(part.files) * source.record_bytes
        for part in (source.train, source.test)
        for name in part.files
    }
    missing = set(sizes)
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                name = member.name.removeprefix("./")
                if name not in missing:
                    continue
                content = tar.extractfile(member) if member.isreg() else None
                if content is None or member.size != sizes[name]:
                    raise DataError(
                        f"{archive.name}: {name} is {'a file' if content else 'no plain file'} of "
                        f"{member.size:,} bytes, expected a file of {sizes[name]:,} bytes"
                    )
                temporary = archive.with_name("member")  # in the cache, so the rename is atomic
                with open(temporary, "wb") as file:
                    shutil.copyfileobj(content, file, 1 << 20)
                folder.mkdir(exist_ok=True)
                temporary.replace(folder / Path(name).name)
                missing.remove(name)
    except (tarfile.TarError, *_GZIP_DAMAGE) as error:
        raise DataError(f"{archive.name} is damaged: {error}") from error
    if missing:
        raise DataError(f"{archive.name} lacks {', '.join(sorted(missing))}")


# Reading the official formats -----------------------------------------------------------------

_GZIP_DAMAGE = (gzip.BadGzipFile, EOFError, zlib.error)
_IDX_CONTENT = {2049: "labels", 2051: "images"}  # magic number: unsigned bytes, 1 or 3 dimensions


def _read_idx_dataset(source: _Source, files: Mapping[str, Path]) -> Dataset:
    """Reads the four idx files of MNIST or a set like it."""
    train = _read_idx_part(source, files, source.train, source.test)
    test = _read_idx_part(source, files, source.test, source.train)
    return Dataset(source.name, *train, *test, classes=source.classes)


def _read_idx_part(
    source: _Source, files: Mapping[str, Path], part: _Part, other: _Part
) -> Examples:
    image_path, label_path = (files[name] for name in part.files)
    images = _read_idx(image_path, (part.count, *source.image_shape[:2]), part, other)
    labels = _read_idx(label_path, (part.count,), part, other).astype(np.int32)
    _check_labels(label_path, labels, len(source.classes), "label")
    _check_class_counts(str(label_path), labels, part, source)
    return Examples(images[..., None], labels)


def _read_idx(
    path: Path, shape: tuple[int, ...], part: _Part, other: _Part
) -> npt.NDArray[np.uint8]:
    """Reads an idx file of unsigned bytes, gzip-compressed or not.

    The header is compared with what is expected before anything else is read, and at most one
    byte more than expected is read: what a hostile header declares is never allocated.

    Args:
      path: the file.
      shape: what the file must declare and hold.
      part: the part of the data set that the file belongs to.
      other: the other part, to tell when the two were swapped.

    Returns:
      uint8 array of that shape.
    """
    magic, size = 2048 + len(shape), math.prod(shape)
    header_size = 4 * (1 + len(shape))
    content = _IDX_CONTENT[magic]
    try:
        with _open_maybe_gzip(path) as file:
            header = file.read(header_size)
            if len(header) == header_size:
                found_magic, *found_shape = struct.unpack(f">{1 + len(shape)}I", header)
                if found_magic != magic:
                    found = _IDX_CONTENT.get(found_magic, "not an idx file of bytes")
                    raise DataError(
                        f"{path}: magic number {found_magic} ({found}), "
                        f"expected {magic} ({content})"
                    )
                if tuple(found_shape) != shape:
                    swapped = found_shape[0] == other.count and tuple(found_shape[1:]) == shape[1:]
                    hint = f"; this is the {other.title} set's size" if swapped else ""
                    raise DataError(
                        f"{path}: declares {content} of shape {tuple(found_shape)}, expected "
                        f"{shape} for the {part.title} set{hint}"
                    )
            body = file.read(size + 1)
    except _GZIP_DAMAGE as error:
        raise DataError(f"{path}: damaged gzip file ({error}), expected {content}") from error
    if len(body) != size:
        length = f"{len(header) + len(body):,} bytes, truncated"
        if len(body) > size:
            length = "trailing bytes after the last of the " + content
        raise DataError(
            f"{path}: {length}; expected {header_size + size:,} bytes after decompression"
        )
    return np.frombuffer(body, np.uint8).reshape(shape)


def _open_maybe_gzip(path: Path) -> gzip.GzipFile | BinaryIO:
    # By content, not by name: some browsers decompress a download and keep the .gz.
    with open(path, "rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if compressed else open(path, "rb")


def _read_cifar(source: _Source, files: Mapping[str, Path]) -> Dataset:
    """Reads the binary files of CIFAR-10 or CIFAR-100."""
    train, test = (_read_cifar_part(source, files, part) for part in (source.train, source.test))
    return Dataset(source.name, *train, *test, classes=source.classes)


def _read_cifar_part(source: _Source, files: Mapping[str, Path], part: _Part) -> Examples:
    images = np.empty((part.count, *source.image_shape), np.uint8)
    labels = np.empty(part.count, np.int32)
    batch = part.count // len(part.files)
    paths = [files[name] for name in part.files]
    for i, path in enumerate(paths):
        here = slice(i * batch, (i + 1) * batch)
        _read_cifar_file(path, images[here], labels[here], source)
    where = f"{paths[0]} to {paths[-1].name}" if len(paths) > 1 else str(paths[0])
    _check_class_counts(where, labels, part, source)
    return Examples(images, labels)


def _read_cifar_file(path: Path, images: Images, labels: Labels, source: _Source) -> None:
    """Fills images, uint8 [N, H, W, C], and labels, int32 [N], from a file of N records."""
    height, width, channels = source.image_shape
    size, expected = path.stat().st_size, len(labels) * source.record_bytes
    if size != expected:
        raise DataError(
            f"{path}: {size:,} bytes, expected {expected:,} "
            f"({len(labels):,} records of {source.record_bytes} bytes)"
        )
    with open(path, "rb") as file:
        for start in range(0, len(labels), 5000):  # 15 MB at a time
            here = slice(start, min(start + 5000, len(labels)))
            block = np.fromfile(file, np.uint8, (here.stop - start) * source.record_bytes)
            records = block.reshape(-1, source.record_bytes)
            labels[here] = records[:, source.label_bytes - 1]
            planes = records[:, source.label_bytes :].reshape(-1, channels, height, width)
            images[here] = planes.transpose(0, 2, 3, 1)
            if source.label_bytes == 2:
                _check_labels(path, records[:, 0], 20, "coarse label")
    _check_labels(path, labels, len(source.classes), "label")


def _check_labels(path: Path, labels: npt.NDArray[Any], num_classes: int, title: str) -> None:
    if labels.max() >= num_classes:
        raise DataError(
            f"{path}: {title} {labels.max()} of image {labels.argmax()}, "
            f"expected 0 to {num_classes - 1}"
        )


def _check_class_counts(where: str, labels: Labels, part: _Part, source: _Source) -> None:
    """Tells a data set or a part from another one whose files look just the same."""
    found = np.bincount(labels, minlength=len(source.classes))
    wrong = np.flatnonzero(found != part.per_class)
    if wrong.size:
        first = wrong[0]
        raise DataError(
            f"{where}: {found[first]:,} of the {part.title} images are of class {first} "
            f"({source.classes[first]}), expected {part.per_class[first]:,}; it is damaged, of "
            f"another data set than {source.name}, or swapped with a file of its other part"
        )


def _load_digits() -> Dataset:
    """scikit-learn's copy of the UCI digits: 8x8 pixels of 0 to 16."""
    bunch = _import_extra("sklearn.datasets").load_digits()
    images, labels = bunch.images.astype(np.uint8)[..., None], bunch.target.astype(np.int32)
    test = _stratified_choice(labels, 360, 10, seed=0)
    return Dataset("digits", images[~test], labels[~test], images[test], labels[test], _DIGIT_NAMES)


# The data sets --------------------------------------------------------------------------------

_DIGIT_NAMES = tuple("0123456789")
# fmt: off
_FASHION_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
    "Ankle boot",
)
_CIFAR10_NAMES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)
_CIFAR100_NAMES = (
    "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle",
    "bottle", "bowl", "boy", "bridge", "bus", "butterfly", "camel", "can", "castle",
    "caterpillar", "cattle", "chair", "chimpanzee", "clock", "cloud", "cockroach", "couch",
    "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant", "flatfish", "forest", "fox",
    "girl", "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion",
    "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain", "mouse", "mushroom",
    "oak_tree", "orange", "orchid", "otter", "palm_tree", "pear", "pickup_truck", "pine_tree",
    "plain", "plate", "poppy", "porcupine", "possum", "rabbit", "raccoon", "ray", "road",
    "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk", "skyscraper", "snail", "snake",
    "spider", "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank", "telephone",
    "television", "tiger", "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale",
    "willow_tree", "wolf", "woman", "worm",
)
# fmt: on
_MNIST_TRAIN = (5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949)
_MNIST_TEST = (980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009)
_TRAIN_IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
_TEST_IDX = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
_TORONTO = ("https://www.cs.toronto.edu/~kriz/",)


def _idx_archives(*digests: str) -> dict[str, str]:
    names = (f"{name}.gz" for name in (*_TRAIN_IDX, *_TEST_IDX))
    return dict(zip(names, digests, strict=True))


# The digests are those of many independent public loaders; those of Fashion-MNIST belong to
# the same files as the MD5 sums that its authors publish.
_SOURCES: dict[str, _Source] = {
    source.name: source
    for source in (
        _Source(
            name="mnist",
            folders=("mnist", "MNIST/raw"),
            train=_Part("training", _TRAIN_IDX, _MNIST_TRAIN),
            test=_Part("test", _TEST_IDX, _MNIST_TEST),
            classes=_DIGIT_NAMES,
            image_shape=(28, 28, 1),
            read=_read_idx_dataset,
            archives=_idx_archives(
                "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
                "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
                "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
                "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
            ),
            mirrors=(
                "https://storage.googleapis.com/cvdf-datasets/mnist/",
                "https://ossci-datasets.s3.amazonaws.com/mnist/",
            ),
        ),
        _Source(
            name="fashion_mnist",
            folders=("fashion_mnist", "fashion-mnist", "FashionMNIST/raw"),
            train=_Part("training", _TRAIN_IDX, (6000,) * 10),
            test=_Part("test", _TEST_IDX, (1000,) * 10),
            classes=_FASHION_NAMES,
            image_shape=(28, 28, 1),
            read=_read_idx_dataset,
            archives=_idx_archives(
                "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
                "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
                "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
                "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
            ),
            mirrors=("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
        ),
        _Source(
            name="cifar10",
            folders=("cifar-10-batches-bin",),
            train=_Part(
                "training", tuple(f"data_batch_{i}.bin" for i in range(1, 6)), (5000,) * 10
            ),
            test=_Part("test", ("test_batch.bin",), (1000,) * 10),
            classes=_CIFAR10_NAMES,
            image_shape=(32, 32, 3),
            read=_read_cifar,
            archives={
                "cifar-10-binary.tar.gz": (
                    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
                )
            },
            mirrors=_TORONTO,
        ),
        _Source(
            name="cifar100",
            folders=("cifar-100-binary",),
            train=_Part("training", ("train.bin",), (500,) * 100),
            test=_Part("test", ("test.bin",), (100,) * 100),
            classes=_CIFAR100_NAMES,
            image_shape=(32, 32, 3),
            read=_read_cifar,
            archives={
                "cifar-100-binary.tar.gz": (
                    "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec"
                )
            },
            mirrors=_TORONTO,
            label_bytes=2,
        ),
    )
}
