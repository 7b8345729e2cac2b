"""The data sets: the real ones, every refusal on small synthetic files, and the download path."""

import dataclasses
import functools
import gzip
import hashlib
import http.server
import io
import shutil
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest

from optgrad.experiments import data

TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
CIFAR10_FILES = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]

# The real data --------------------------------------------------------------------------------

MNIST_TRAIN = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
MNIST_TEST = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


@pytest.mark.parametrize(
    ("name", "shape", "train_counts", "test_counts", "mean", "std"),
    [
        ("mnist", (28, 28, 1), MNIST_TRAIN, MNIST_TEST, [0.1307], [0.3081]),
        (
            "cifar10",
            (32, 32, 3),
            [5000] * 10,
            [1000] * 10,
            [0.4914, 0.4822, 0.4465],
            [0.2470, 0.2435, 0.2616],
        ),
        (
            "cifar100",
            (32, 32, 3),
            [500] * 100,
            [100] * 100,
            [0.5071, 0.4865, 0.4409],
            [0.2673, 0.2564, 0.2762],
        ),
    ],
)
def test_real_data(real_data_dir, name, shape, train_counts, test_counts, mean, std):
    dataset = data.load(name, real_data_dir, download=False)
    assert dataset.image_shape == shape
    assert dataset.num_classes == len(dataset.classes) == len(train_counts)
    assert np.bincount(dataset.train_labels).tolist() == train_counts
    assert np.bincount(dataset.test_labels).tolist() == test_counts
    assert len(dataset.train.images) == sum(train_counts)
    np.testing.assert_allclose(dataset.mean / 255, mean, atol=6e-5)
    np.testing.assert_allclose(dataset.std / 255, std, atol=6e-5)
    if name == "mnist":  # the original order: the best known first digits of all
        assert dataset.train_labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
        assert dataset.test_labels[:5].tolist() == [7, 2, 1, 0, 4]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("cifar10", "cifar-10-batches-bin/batches.meta.txt"),
        ("cifar100", "cifar-100-binary/fine_label_names.txt"),
    ],
)
def test_class_names_are_the_official_ones(real_data_dir, name, file):
    assert data._SOURCES[name].classes == tuple((real_data_dir / file).read_text().split())


def test_real_mnist_is_not_taken_for_fashion_mnist(real_data_dir):
    # The files have the same names, sizes and headers.
    with pytest.raises(data.DataError, match=r"train-labels.* another data set than fashion_mnist"):
        data.load("fashion_mnist", real_data_dir / "mnist", download=False)


# The data set in memory -----------------------------------------------------------------------


def test_digits():
    dataset = data.load("digits")
    again = data.load("digits")
    assert dataset.image_shape == (8, 8, 1)
    assert (len(dataset.train_labels), len(dataset.test_labels)) == (1437, 360)
    assert dataset.train_images.max() == 16
    np.testing.assert_array_equal(dataset.test_images, again.test_images)
    # 360 of 1797 in each class, to within the rounding
    share = np.bincount(dataset.test_labels) / np.bincount(
        np.concatenate([dataset.train_labels, dataset.test_labels])
    )
    np.testing.assert_allclose(share, 360 / 1797, atol=1 / 170)


def test_unknown_name_gets_suggestions():
    with pytest.raises(ValueError, match=r"name = 'cifar_10' .*'cifar10'.*Accepted: 'digits'"):
        data.load("cifar_10")


def synthetic(sizes=(7, 11, 32), shape=(4, 5, 3), seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes)).astype(np.int32)
    images = rng.integers(0, 256, (len(labels), *shape), np.uint8)
    classes = tuple("abcdefghij"[: len(sizes)])
    return data.Dataset("synthetic", images, labels, images[:3], labels[:3], classes)


def test_mean_and_std_are_exact():
    dataset = synthetic(sizes=(1500, 1003), shape=(2, 3, 2))  # more than one chunk
    pixels = dataset.train_images.astype(np.float64)
    np.testing.assert_allclose(dataset.mean, pixels.mean((0, 1, 2)), rtol=1e-7)
    np.testing.assert_allclose(dataset.std, pixels.std((0, 1, 2)), rtol=1e-7)
    assert dataset.mean.dtype == dataset.std.dtype == np.float32
    assert dataset.mean.shape == (2,)


def test_std_of_a_constant_channel_divides_without_nan():
    images, labels = np.full((2, 1, 1, 1), 7, np.uint8), np.zeros(2, np.int32)
    dataset = data.Dataset("constant", images, labels, images, labels, ("only",))
    assert (dataset.mean, dataset.std) == (7, 1)


def test_arrays_are_read_only_and_the_callers_stay_writable():
    images, labels = np.zeros((2, 1, 1, 1), np.uint8), np.zeros(2, np.int32)
    dataset = data.Dataset("x", images, labels, images, labels, ("only",))
    with pytest.raises(ValueError, match="read-only"):
        dataset.train_images[0] = 1
    images[0] = 1


@pytest.mark.parametrize("size", [13, 0.26, np.int64(13), np.float32(0.26)])
def test_split_validation_is_stratified_and_loses_nothing(size):
    dataset = synthetic()
    split = dataset.split_validation(size, seed=3)
    assert (len(split.train.labels), len(split.validation.labels)) == (37, 13)
    # shares of 13/50: 1.82, 2.86, 8.32; by largest remainder
    assert np.bincount(split.validation_labels).tolist() == [2, 3, 8]
    assert split.test_images is dataset.test_images or np.shares_memory(
        split.test_images, dataset.test_images
    )
    whole = np.concatenate([split.train_images, split.validation_images])
    rows = [image.tobytes() for image in whole]
    assert sorted(rows) == sorted(image.tobytes() for image in dataset.train_images)
    by_image = {
        image.tobytes(): label
        for image, label in zip(dataset.train_images, dataset.train_labels, strict=True)
    }
    for part in (split.train, split.validation):
        for image, label in zip(*part, strict=True):
            assert by_image[image.tobytes()] == label
    assert not np.array_equal(split.mean, dataset.mean)  # of what is left for training


def test_split_validation_depends_on_its_seed_alone():
    one, same, other = (synthetic().split_validation(13, seed=s) for s in (3, 3, 4))
    np.testing.assert_array_equal(one.validation_images, same.validation_images)
    assert not np.array_equal(one.validation_images, other.validation_images)


def test_choice_does_not_change_with_versions():
    chosen = data._stratified_choice(np.arange(20, dtype=np.int32) % 4, 6, 4, seed=0)
    assert np.flatnonzero(chosen).tolist() == [0, 5, 6, 11, 14, 19]  # as first written


@pytest.mark.parametrize("size", [0, 50, -1, 51, 0.0, 1.0, 1.5, -0.1, float("nan"), 0.001])
def test_split_validation_refuses_impossible_sizes(size):
    with pytest.raises(ValueError, match=rf"size = {size} .*accepted: an integer from 1 to 49 or"):
        synthetic().split_validation(size)


@pytest.mark.parametrize("size", [True, "10", None])
def test_split_validation_refuses_what_is_no_number(size):
    with pytest.raises(TypeError, match=rf"size = {size!r} is not a number; accepted"):
        synthetic().split_validation(size)


@pytest.mark.parametrize(
    ("seed", "error"), [(-1, ValueError), (2**32, ValueError), (0.5, TypeError)]
)
def test_split_validation_refuses_impossible_seeds(seed, error):
    with pytest.raises(error, match=rf"seed = {seed} .*accepted: 0 to 2\*\*32 - 1"):
        synthetic().split_validation(5, seed)


def test_split_validation_refuses_to_split_twice():
    with pytest.raises(ValueError, match="has a validation set of 5 examples already"):
        synthetic().split_validation(5).split_validation(5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_images": np.zeros((50, 4, 5), np.uint8)}, r"train_images has shape \(50, 4, 5\)"),
        ({"train_images": np.zeros((50, 4, 5, 3))}, "train_images is float64"),
        ({"train_labels": np.zeros(49, np.int32)}, r"train_labels is int32 \(49,\)"),
        ({"train_labels": np.zeros(50, np.int64)}, "train_labels is int64"),
        ({"test_images": np.zeros((3, 4, 4, 3), np.uint8)}, "test_images is uint8"),
        ({"test_labels": np.array([0, 1, 3], np.int32)}, "test_labels has values from 0 to 3"),
        ({"test_labels": np.array([0, 1, -1], np.int32)}, "test_labels has values from -1 to 1"),
    ],
)
def test_dataset_refuses_arrays_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(synthetic(), **change)


# Small files in the official formats ----------------------------------------------------------


def idx_bytes(array):
    return struct.pack(f">{1 + array.ndim}I", 2048 + array.ndim, *array.shape) + array.tobytes()


def small_labels(source, part, rng):
    return rng.permutation(np.repeat(np.arange(len(part.per_class)), part.per_class))


def idx_contents(source, seed=0):
    """The raw content of the four files and the arrays in them."""
    rng = np.random.default_rng(seed)
    contents, arrays = {}, []
    for part in (source.train, source.test):
        labels = small_labels(source, part, rng).astype(np.uint8)
        images = rng.integers(0, 256, (len(labels), 28, 28), np.uint8)
        for name, array in zip(part.files, (images, labels), strict=True):
            contents[name] = idx_bytes(array)
            arrays.append(array)
    return contents, arrays


def cifar_contents(source, seed=0):
    """The content of the binary files and the arrays in them."""
    rng = np.random.default_rng(seed)
    contents, arrays = {}, []
    for part in (source.train, source.test):
        labels = small_labels(source, part, rng)
        images = rng.integers(0, 256, (len(labels), 32, 32, 3), np.uint8)
        records = [
            bytes([label // 5, label][-source.label_bytes :])
            + b"".join(image[:, :, channel].tobytes() for channel in range(3))
            for image, label in zip(images, labels, strict=True)
        ]
        size = len(records) // len(part.files)
        for i, name in enumerate(part.files):
            contents[name] = b"".join(records[i * size : (i + 1) * size])
        arrays += [images, labels]
    return contents, arrays


@pytest.fixture
def small(monkeypatch):
    """Shrinks the data sets: the same formats with fewer images."""

    def shrink(name, train, test):
        source = data._SOURCES[name]
        source = dataclasses.replace(
            source,
            train=dataclasses.replace(source.train, per_class=train),
            test=dataclasses.replace(source.test, per_class=test),
        )
        monkeypatch.setitem(data._SOURCES, name, source)

    shrink("mnist", (1, 2, 3, 4, 5, 5, 4, 3, 2, 1), (1,) * 10)
    shrink("fashion_mnist", (3,) * 10, (1,) * 10)
    shrink("cifar10", (2,) * 10, (1,) * 10)
    shrink("cifar100", (2,) * 100, (1,) * 100)
    return data._SOURCES


REAL_USER_CACHE = data.user_cache


@pytest.fixture(autouse=True)
def isolated(monkeypatch, tmp_path, request):
    """No test of synthetic files sees the user's settings, cache or the network's proxies."""
    if "real_data_dir" in request.fixturenames:
        return
    for variable in ("OPTGRAD_DATA_DIR", "OPTGRAD_MIRRORS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(data, "user_cache", lambda: tmp_path / "cache")
    monkeypatch.setattr(data, "_WAIT", 0.0)


def write(folder, contents, compress=False):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        path = folder / (f"{name}.gz" if compress else name)
        path.write_bytes(gzip.compress(content, 1) if compress else content)


def load(name, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return data.load(name, folder, download=False)


def assert_holds(dataset, arrays):
    images, labels, test_images, test_labels = arrays
    shape = dataset.image_shape
    np.testing.assert_array_equal(dataset.train_images, images.reshape(-1, *shape))
    np.testing.assert_array_equal(dataset.train_labels, labels)
    np.testing.assert_array_equal(dataset.test_images, test_images.reshape(-1, *shape))
    np.testing.assert_array_equal(dataset.test_labels, test_labels)
    assert dataset.train_labels.dtype == np.int32


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("mnist", "mnist"),
        ("mnist", "."),
        ("mnist", "MNIST/raw"),
        ("fashion_mnist", "fashion_mnist"),
        ("fashion_mnist", "fashion-mnist"),
        ("fashion_mnist", "."),
    ],
)
def test_idx_layouts(small, tmp_path, name, folder, compress):
    contents, arrays = idx_contents(small[name])
    write(tmp_path / folder, contents, compress)
    assert_holds(load(name, tmp_path), arrays)


def test_idx_compression_is_told_by_content(small, tmp_path):
    contents, arrays = idx_contents(small["mnist"])
    write(tmp_path, {f"{name}.gz": content for name, content in contents.items()})
    assert_holds(load("mnist", str(tmp_path)), arrays)


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("cifar10", "cifar-10-batches-bin"),
        ("cifar10", "."),
        ("cifar100", "cifar-100-binary"),
        ("cifar100", "."),
    ],
)
def test_cifar_layouts(small, tmp_path, name, folder):
    contents, arrays = cifar_contents(small[name])
    write(tmp_path / folder, contents)
    assert_holds(load(name, tmp_path), arrays)


# Refusals -------------------------------------------------------------------------------------


def with_header(*numbers):
    return lambda content: struct.pack(f">{len(numbers)}I", *numbers) + content[4 * len(numbers) :]


def with_label(label):
    return lambda content: content[:-1] + bytes([label])


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (TRAIN_IMAGES, lambda c: b"", "0 bytes, truncated; expected 23,536 bytes"),
        (TRAIN_IMAGES, lambda c: c[:9], "9 bytes, truncated; expected 23,536 bytes"),
        (TRAIN_IMAGES, lambda c: c[:-1], "23,535 bytes, truncated; expected 23,536"),
        (TRAIN_IMAGES, lambda c: c + b"\0", "trailing bytes after the last of the images"),
        (TRAIN_IMAGES, lambda c: b"<!DOCTYPE html>" + c, "not an idx file .*expected 2051"),
        (TRAIN_IMAGES, with_header(2049), r"magic number 2049 \(labels\), expected 2051 \(images"),
        (TRAIN_IMAGES, with_header(0x0D03), "not an idx file of bytes"),  # float32 elements
        (TRAIN_IMAGES, with_header(2051, 29), r"\(29, 28, 28\), expected \(30, 28, 28\)"),
        (TRAIN_IMAGES, with_header(2051, 30, 32, 32), r"\(30, 32, 32\), expected \(30, 28, 28\)"),
        (TRAIN_IMAGES, with_header(2051, 10), "the test set's size"),
        (TEST_IMAGES, with_header(2051, 30), "the training set's size"),
        (TRAIN_LABELS, with_header(2049, 29), r"\(29,\), expected \(30,\) for the training set"),
        (TRAIN_LABELS, with_header(2051), r"2051 \(images\), expected 2049 \(labels\)"),
        (TEST_LABELS, lambda c: c[:-1], "17 bytes, truncated; expected 18"),
        (TEST_LABELS, with_label(10), "label 10 of image 9, expected 0 to 9"),
        (TEST_LABELS, lambda c: c[:8] + bytes(10), r"10 of the test images are of class 0 \(0\)"),
    ],
)
def test_idx_refusals(small, tmp_path, file, change, message, compress):
    contents, _ = idx_contents(small["mnist"])
    contents[file] = change(contents[file])
    write(tmp_path, contents, compress)
    with pytest.raises(data.DataError, match=f"{file}.*{message}"):
        load("mnist", tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: c[:-1],
        lambda c: c[: len(c) // 2],
        lambda c: c[:-8] + bytes(8),  # the check sum
        lambda c: c[:500] + bytes(100) + c[600:],
        lambda c: c + b"garbage",
        lambda c: c[:2],
    ],
)
def test_damaged_gzip_is_refused(small, tmp_path, damage):
    contents, _ = idx_contents(small["mnist"])
    write(tmp_path, contents, compress=True)
    path = tmp_path / f"{TRAIN_IMAGES}.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(data.DataError, match=f"{TRAIN_IMAGES}.gz: damaged gzip file"):
        load("mnist", tmp_path)


def test_swapped_idx_files_are_refused(small, tmp_path):
    contents, _ = idx_contents(small["mnist"])
    contents[TRAIN_IMAGES], contents[TEST_IMAGES] = contents[TEST_IMAGES], contents[TRAIN_IMAGES]
    write(tmp_path, contents)
    with pytest.raises(data.DataError, match=f"{TRAIN_IMAGES}.* the test set's size"):
        load("mnist", tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        struct.pack(">4I", 2051, *[2**32 - 1] * 3),  # declares 2**96 bytes
        struct.pack(">4I", 2051, 30, 28, 28) + bytes(50_000_000),  # holds more than it declares
    ],
)
def test_hostile_sizes_allocate_nothing(small, tmp_path, content):
    contents, _ = idx_contents(small["mnist"])
    write(tmp_path, contents, compress=True)
    (tmp_path / f"{TRAIN_IMAGES}.gz").write_bytes(gzip.compress(content, 1))
    tracemalloc.start()
    try:
        with pytest.raises(data.DataError, match=TRAIN_IMAGES):
            load("mnist", tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2_000_000


@pytest.mark.parametrize(
    ("name", "file", "change", "message"),
    [
        ("cifar10", "data_batch_2.bin", lambda c: c[:-1], "12,291 bytes, expected 12,292 .4 rec"),
        ("cifar10", "data_batch_2.bin", lambda c: c + b"\0", "12,293 bytes, expected 12,292"),
        ("cifar10", "test_batch.bin", lambda c: b"", "0 bytes, expected 30,730 .10 records"),
        (
            "cifar10",
            "data_batch_5.bin",
            lambda c: b"\x0a" + c[1:],
            "label 10 of image 0, .* 0 to 9",
        ),
        ("cifar100", "train.bin", lambda c: c[:1] + b"\x64" + c[2:], "label 100 of image 0"),
        (
            "cifar100",
            "train.bin",
            lambda c: b"\x14" + c[1:],
            "coarse label 20 of image 0, .* to 19",
        ),
        ("cifar100", "test.bin", lambda c: 2 * c, "614,800 bytes, expected 307,400 .100 records"),
    ],
)
def test_cifar_refusals(small, tmp_path, name, file, change, message):
    contents, _ = cifar_contents(small[name])
    contents[file] = change(contents[file])
    write(tmp_path, contents)
    with pytest.raises(data.DataError, match=f"{file}: .*{message}"):
        load(name, tmp_path)


def test_swapped_cifar100_files_are_refused(small, tmp_path):
    contents, _ = cifar_contents(small["cifar100"])
    write(tmp_path, {"train.bin": contents["test.bin"], "test.bin": contents["train.bin"]})
    with pytest.raises(data.DataError, match=r"train.bin: 307,400 bytes, expected 614,800"):
        load("cifar100", tmp_path)


def test_cifar10_batch_of_the_other_part_is_refused(small, tmp_path):
    # As large as the right one: told by the number of images of each class.
    contents, _ = cifar_contents(small["cifar10"])
    contents["data_batch_1.bin"] = contents["test_batch.bin"][: 4 * 3073]
    write(tmp_path, contents)
    with pytest.raises(data.DataError, match=r"data_batch_1.bin to data_batch_5.bin: .* of class"):
        load("cifar10", tmp_path)


# Where files are looked for -------------------------------------------------------------------


def test_places_are_tried_in_order(small, tmp_path, monkeypatch):
    places = [tmp_path / name for name in ("given", "from_environment", "cache")]
    monkeypatch.setenv("OPTGRAD_DATA_DIR", str(places[1]))
    arrays = []
    for seed, place in enumerate(places):
        contents, of_place = idx_contents(small["mnist"], seed)
        write(place / "mnist", contents)
        arrays.append(of_place)
    assert_holds(load("mnist", places[0]), arrays[0])
    assert_holds(load("mnist", None), arrays[1])
    monkeypatch.delenv("OPTGRAD_DATA_DIR")
    assert_holds(load("mnist", None), arrays[2])


def test_a_given_folder_without_the_data_is_told(small, tmp_path):
    contents, arrays = idx_contents(small["mnist"])
    write(tmp_path / "cache" / "mnist", contents)
    (tmp_path / "given").mkdir()
    with pytest.warns(UserWarning, match=r"mnist is not in data_dir .*given: none of train-images"):
        dataset = data.load("mnist", tmp_path / "given")
    assert_holds(dataset, arrays)


def test_a_damaged_file_is_not_passed_over(small, tmp_path):
    contents, _ = idx_contents(small["mnist"])
    write(tmp_path / "cache" / "mnist", contents)
    write(tmp_path / "given", dict.fromkeys(contents, b""))
    with pytest.raises(data.DataError, match="given"):
        load("mnist", tmp_path / "given")


def test_not_found_lists_every_place(small, tmp_path, monkeypatch):
    contents, _ = idx_contents(small["mnist"])
    del contents[TEST_LABELS]
    write(tmp_path / "given" / "mnist", contents)
    monkeypatch.setenv("OPTGRAD_DATA_DIR", str(tmp_path / "from_environment"))
    with pytest.raises(data.DataNotFoundError) as caught:
        load("mnist", tmp_path / "given")
    message = str(caught.value)
    assert isinstance(caught.value, data.DataError | FileNotFoundError)
    for expected in (
        f"data_dir {tmp_path / 'given'}: {tmp_path / 'given' / 'mnist'} lacks {TEST_LABELS}",
        f"$OPTGRAD_DATA_DIR {tmp_path / 'from_environment'}: no such folder",
        f"user cache {tmp_path / 'cache'}: no such folder",
        "download=False",
        f"put {TRAIN_IMAGES}",
        "pass the folder above it as data_dir or in the environment variable OPTGRAD_DATA_DIR",
    ):
        assert expected in message


# Downloads ------------------------------------------------------------------------------------


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; notes each path, and answers the first requests as ``faults`` says."""

    def do_GET(self):
        self.server.requests.append(self.path)
        beginning = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-")
        self.server.beginnings.append(int(beginning))
        fault = self.server.faults.pop(0) if self.server.faults else None
        if fault == "unavailable":
            self.send_error(503)
        elif fault == "redirect":
            self.send_response(302)
            self.send_header("Location", self.path)
            self.end_headers()
        elif fault in {"no_range", "lie"} or not Path(self.translate_path(self.path)).is_file():
            self.give_or_lie(fault == "lie")
        else:
            self.give(int(beginning), fault)

    def give_or_lie(self, is_lie):
        if not is_lie:
            super().do_GET()
            return
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", "7")
        self.end_headers()
        self.wfile.write(b"<html/>")

    def give(self, beginning, fault):
        """The rest of a file; with a fault half of the rest, and silence or an end after it."""
        content = Path(self.translate_path(self.path)).read_bytes()[beginning:]
        self.send_response(206 if beginning else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if fault not in {"cut", "stall"}:
            self.wfile.write(content)
            return
        self.wfile.write(content[: len(content) // 2])
        self.wfile.flush()
        if fault == "stall":
            self.server.goes_on.wait(5.0)
        self.close_connection = True

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        running.folder, running.requests, running.faults = folder, [], []
        running.beginnings, running.goes_on = [], threading.Event()
        running.url = f"http://127.0.0.1:{running.server_port}"
        thread = threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield running
        running.goes_on.set()
        running.shutdown()
        thread.join()


def serve(server, monkeypatch, name, archives, subfolder="."):
    """Puts archives on the server and their digests where the official ones are."""
    folder = server.folder / subfolder
    folder.mkdir(exist_ok=True, parents=True)
    for archive, content in archives.items():
        (folder / archive).write_bytes(content)
    digests = {a: hashlib.sha256(content).hexdigest() for a, content in archives.items()}
    source = dataclasses.replace(data._SOURCES[name], archives=digests)
    monkeypatch.setitem(data._SOURCES, name, source)


def gzipped(contents):
    return {f"{name}.gz": gzip.compress(content, 1) for name, content in contents.items()}


def tarred(members):
    """A .tar.gz of (name, content), where None makes a symbolic link to /etc/passwd."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if content is None:
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
            else:
                member.size = len(content)
            tar.addfile(member, io.BytesIO(content or b""))
    return buffer.getvalue()


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def cache_leftovers(tmp_path):
    """Everything in the user cache, folders included."""
    return [path.name for path in (tmp_path / "cache").glob("*")]


def test_download_idx(small, tmp_path, server, monkeypatch):
    contents, arrays = idx_contents(small["fashion_mnist"])
    serve(server, monkeypatch, "fashion_mnist", gzipped(contents))
    assert_holds(data.load("fashion_mnist", mirrors=[server.url]), arrays)
    assert files_below(tmp_path / "cache") == sorted(f"fashion_mnist/{n}.gz" for n in contents)
    assert len(server.requests) == 4
    assert_holds(data.load("fashion_mnist", mirrors=[server.url]), arrays)
    assert len(server.requests) == 4  # from the cache


def test_download_tar_extracts_only_what_is_expected(small, tmp_path, server, monkeypatch):
    contents, arrays = cifar_contents(small["cifar10"])
    members = [("../evil", b"x"), ("/tmp/optgrad-evil", b"x"), ("cifar-10-batches-bin/link", None)]
    members += [(f"cifar-10-batches-bin/{name}", c) for name, c in contents.items()]
    members += [("cifar-10-batches-bin/readme.html", b"x"), ("./cifar-10-batches-bin/x", b"x")]
    serve(server, monkeypatch, "cifar10", {"cifar-10-binary.tar.gz": tarred(members)})
    assert_holds(data.load("cifar10", mirrors=[server.url]), arrays)
    expected = sorted(f"cifar-10-batches-bin/{name}" for name in CIFAR10_FILES)
    assert files_below(tmp_path / "cache") == expected  # and not the archive
    assert cache_leftovers(tmp_path) == ["cifar-10-batches-bin"]
    assert not (tmp_path / "evil").exists()
    assert not Path("/tmp/optgrad-evil").exists()


FOLDER = "cifar-100-binary/"


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({FOLDER + "train.bin": None}, r"train.bin is no plain file"),
        ({FOLDER + "train.bin": b"short"}, r"train.bin is a file of 5 bytes, expected .*614,800"),
        ({}, r"lacks cifar-100-binary/train.bin"),
    ],
)
def test_wrong_archives_are_refused(small, tmp_path, server, monkeypatch, members, message):
    contents, _ = cifar_contents(small["cifar100"])
    members = [(FOLDER + "test.bin", contents["test.bin"]), *members.items()]
    serve(server, monkeypatch, "cifar100", {"cifar-100-binary.tar.gz": tarred(members)})
    with pytest.raises(data.DataError, match=rf"cifar-100-binary.tar.gz.*{message}"):
        data.load("cifar100", mirrors=[server.url])
    assert files_below(tmp_path / "cache") == ["cifar-100-binary/test.bin"]  # whole


@pytest.mark.parametrize("damage", [lambda c: c[: len(c) // 2], lambda c: b"no tar" * 1000])
def test_damaged_archives_are_refused(small, tmp_path, server, monkeypatch, damage):
    contents, _ = cifar_contents(small["cifar100"])
    archive = damage(tarred((FOLDER + name, content) for name, content in contents.items()))
    serve(server, monkeypatch, "cifar100", {"cifar-100-binary.tar.gz": archive})
    with pytest.raises(data.DataError, match=r"cifar-100-binary.tar.gz is damaged"):
        data.load("cifar100", mirrors=[server.url])
    assert files_below(tmp_path / "cache") == []


def test_wrong_digest_is_refused_and_leaves_nothing(small, tmp_path, server, monkeypatch):
    contents, _ = idx_contents(small["mnist"])
    serve(server, monkeypatch, "mnist", gzipped(contents))
    (server.folder / f"{TRAIN_IMAGES}.gz").write_bytes(b"something else")
    with pytest.raises(data.DataNotFoundError, match=rf"{TRAIN_IMAGES}.gz: SHA256 hash"):
        data.load("mnist", mirrors=[server.url])
    assert cache_leftovers(tmp_path) == []
    assert len(server.requests) == 1  # another attempt would bring the same file


def test_second_mirror_is_used(small, server, monkeypatch):
    contents, arrays = idx_contents(small["mnist"])
    serve(server, monkeypatch, "mnist", gzipped(contents), "good/mnist")
    mirrors = [f"{server.url}/missing/", f"{server.url}/good/{{name}}"]
    assert_holds(data.load("mnist", mirrors=mirrors), arrays)
    assert server.requests[:2] == [f"/{f}/{TRAIN_IMAGES}.gz" for f in ("missing", "good/mnist")]


def test_mirrors_from_the_environment(small, server, monkeypatch):
    contents, arrays = idx_contents(small["mnist"])
    serve(server, monkeypatch, "mnist", gzipped(contents), "mnist")
    monkeypatch.setenv("OPTGRAD_MIRRORS", f"{server.url}/other {server.url}/{{name}}")
    assert_holds(data.load("mnist"), arrays)
    assert len(server.requests) == 8


@pytest.mark.parametrize("fault", ["unavailable", "cut", "stall"])
def test_passing_faults_are_retried(small, server, monkeypatch, fault):
    contents, arrays = idx_contents(small["mnist"])
    serve(server, monkeypatch, "mnist", gzipped(contents))
    monkeypatch.setattr(data, "_TIMEOUT", (5.0, 0.3))
    server.faults = [fault, fault]
    assert_holds(data.load("mnist", mirrors=server.url), arrays)
    assert len(server.requests) == 6


def test_redirects_are_followed(small, server, monkeypatch):
    contents, arrays = idx_contents(small["mnist"])
    serve(server, monkeypatch, "mnist", gzipped(contents))
    server.faults = ["redirect"]
    assert_holds(data.load("mnist", mirrors=server.url), arrays)
    assert len(server.requests) == 5


def test_broken_connections_are_resumed(small, server, monkeypatch):
    """Only what has not arrived is asked for again, once for every break."""
    contents, arrays = idx_contents(small["mnist"])
    archives = gzipped(contents)
    serve(server, monkeypatch, "mnist", archives)
    server.faults = ["cut", "cut"]
    assert_holds(data.load("mnist", mirrors=server.url), arrays)
    size = len(archives[server.requests[0].removeprefix("/")])
    first, second, third, *others = server.beginnings
    assert first == 0 < size // 2 - 1024 < second <= size // 2 < third < size  # pieces of 1,024
    assert not any(others)


@pytest.mark.parametrize("fault", ["no_range", "lie"])
def test_resuming_that_goes_wrong_begins_anew(small, server, monkeypatch, fault):
    """A server that sends the whole file again, or something else as the rest."""
    contents, arrays = idx_contents(small["mnist"])
    serve(server, monkeypatch, "mnist", gzipped(contents))
    server.faults = ["cut", fault]
    assert_holds(data.load("mnist", mirrors=server.url), arrays)
    assert server.beginnings[1] > 0
    assert not any(server.beginnings[2:])


def test_a_mirror_that_lies_is_left(small, tmp_path, server, monkeypatch):
    """An error page instead of the file, with the status of success; the next mirror is asked."""
    contents, arrays = idx_contents(small["mnist"])
    serve(server, monkeypatch, "mnist", gzipped(contents), "good")
    server.faults = ["lie"]
    found = data.load("mnist", mirrors=[f"{server.url}/lies", f"{server.url}/good"])
    assert_holds(found, arrays)
    assert len(server.requests) == 1 + 1 + 2 * 3
    server.faults = ["lie"] * 9
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(data.DataNotFoundError, match="SHA256"):
        data.load("mnist", mirrors=[server.url])
    assert cache_leftovers(tmp_path) == []


def test_offline_error_lists_places_and_mirrors(small, tmp_path):
    with socket.socket() as unused:  # bound and not listening: connections are refused
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(data.DataNotFoundError) as caught:
            data.load("cifar10", tmp_path, mirrors=[f"{url}/a", f"{url}/b"])
    message = str(caught.value)
    assert f"data_dir {tmp_path}: none of data_batch_1.bin" in message
    assert f"user cache {tmp_path / 'cache'}: no such folder" in message
    assert f"{url}/a/cifar-10-binary.tar.gz: " in message
    assert f"{url}/b/cifar-10-binary.tar.gz: " in message
    assert "To provide the files" in message
    assert cache_leftovers(tmp_path) == []


def test_download_can_be_forbidden(small, server):
    with pytest.raises(data.DataNotFoundError, match="download=False"):
        data.load("mnist", download=False, mirrors=[server.url])
    assert server.requests == []


@pytest.mark.parametrize("mirrors", [[], ["ftp://host/"], ["/a/folder"]])
def test_unusable_mirrors_are_refused(mirrors):
    with pytest.raises(ValueError, match=r"mirrors .*accepted: one or more URLs"):
        data.load("mnist", mirrors=mirrors)


def test_unusable_mirrors_in_the_environment_are_refused(monkeypatch):
    monkeypatch.setenv("OPTGRAD_MIRRORS", "folder")
    with pytest.raises(ValueError, match="OPTGRAD_MIRRORS has the URL 'folder'"):
        data.load("mnist")


def test_official_digests_are_sha256():
    for source in data._SOURCES.values():
        assert all(len(bytes.fromhex(digest)) == 32 for digest in source.archives.values())


# Optional dependencies ------------------------------------------------------------------------


def test_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "user_cache", REAL_USER_CACHE)
    monkeypatch.setitem(sys.modules, "pooch", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'pooch .*pip install "optgrad\[experiments\]"'):
        data.load("mnist", tmp_path / "elsewhere")
    with pytest.raises(ImportError, match=r'sklearn .*pip install "optgrad\[experiments\]"'):
        data.load("digits")


def test_files_that_are_there_need_no_pooch(small, tmp_path, monkeypatch):
    contents, arrays = idx_contents(small["mnist"])
    write(tmp_path, contents)
    monkeypatch.setitem(sys.modules, "pooch", None)
    assert_holds(load("mnist", tmp_path), arrays)


def test_optional_packages_are_imported_when_needed():
    program = (
        "import sys, optgrad; assert 'optgrad.experiments' not in sys.modules;"
        "import optgrad.experiments.data;"
        "assert not {'pooch', 'requests', 'sklearn', 'tqdm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
