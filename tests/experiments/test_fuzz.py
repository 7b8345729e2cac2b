"""Damaged files by the thousand: refused by an error that names them, never a crash or a mislabel.

``pytest tests/experiments/test_fuzz.py -n 0 --fuzz-inputs 100000`` tries so many of each kind.
"""

import random
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

from experiments.test_data import cifar_contents, idx_contents, isolated, small, write
from optgrad.experiments import data
from optgrad.experiments.config import CompareConfig, ConfigError, load_config

__all__ = ["isolated", "small"]  # fixtures

SLOWEST = 5.0  # seconds for one small file: nothing hangs
CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("**/*.toml"))


@pytest.fixture
def inputs(request):
    return request.config.getoption("--fuzz-inputs")


# Mutations: (content, randomness) -> content ---------------------------------------------------


def flip_a_bit(content, rng):
    i = rng.randrange(len(content))
    return content[:i] + bytes([content[i] ^ (1 << rng.randrange(8))]) + content[i + 1 :]


def change_bytes(content, rng):
    changed = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def change_the_head(content, rng):
    changed = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        i = rng.randrange(min(16, len(changed)))
        changed[i] = rng.choice((0, 1, 8, 127, 128, 255, rng.randrange(256)))
    return bytes(changed)


def truncate(content, rng):
    return content[: rng.randrange(len(content))]


def insert(content, rng):
    i = rng.randrange(len(content) + 1)
    return content[:i] + rng.randbytes(rng.randint(1, 64)) + content[i:]


def cut(content, rng):
    i = rng.randrange(len(content))
    return content[:i] + content[i + rng.randint(1, 64) :]


def repeat(content, rng):
    i = rng.randrange(len(content))
    j = rng.randint(i, min(len(content), i + 3000))
    return content[:j] + content[i:]


def blank(content, rng):
    i = rng.randrange(len(content))
    n = min(rng.randint(1, 5000), len(content) - i)
    return content[:i] + bytes(n) + content[i + n :]


def anything(content, rng):
    return rng.randbytes(rng.randint(0, 2 * len(content)) if len(content) < 1000 else 100)


MUTATIONS = (
    flip_a_bit, change_bytes, change_the_head, truncate, insert, cut, repeat, blank, anything,
)  # fmt: skip


def mutated(content, rng):
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if content:
            content = rng.choice(MUTATIONS)(content, rng)
    return content


# Data sets --------------------------------------------------------------------------------------


def tried(name, folder):
    """What loading gives, and that it takes no time to speak of."""
    start = time.monotonic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return data.load(name, folder, download=False), ""
    except data.DataError as error:
        return None, str(error)
    finally:
        assert time.monotonic() - start < SLOWEST


@pytest.mark.parametrize(  # CIFAR's binary files are never compressed one by one
    ("name", "compress"),
    [("mnist", False), ("mnist", True), ("cifar10", False), ("cifar100", False)],
)
def test_damaged_data(small, tmp_path, inputs, name, compress):
    """Refused by the file's name; or it has all images, and labels of the right numbers.

    Which pixel is which nobody can tell, nor whether two labels have been exchanged, in files that
    are unpacked already: archives have digests. A single label that is changed is always found.
    """
    is_idx = name == "mnist"
    source = small[name]
    contents, arrays = (idx_contents if is_idx else cifar_contents)(source)
    write(tmp_path, contents, compress)
    stored = {path.name.removesuffix(".gz"): path for path in tmp_path.iterdir()}
    original = {key: path.read_bytes() for key, path in stored.items()}
    rng, refused = random.Random(f"{name}{compress}"), 0
    for _ in range(inputs):
        key = rng.choice(sorted(stored))
        content = mutated(original[key], rng)
        stored[key].write_bytes(content)
        found, message = tried(name, tmp_path)
        if found is None:
            together = f"{source.train.files[0]} to " in message and key in source.train.files
            assert stored[key].name in message or together, (key, message)
            refused += 1
        else:
            counts = np.bincount(found.train_labels, minlength=len(source.train.per_class))
            np.testing.assert_array_equal(counts, source.train.per_class)
            changed = np.sum(found.train_labels != arrays[1]) + np.sum(
                found.test_labels != arrays[3]
            )
            assert changed != 1
            if compress:  # the check sum tells everything
                np.testing.assert_array_equal(found.train_images.ravel(), arrays[0].ravel())
                np.testing.assert_array_equal(found.train_labels, arrays[1])
        stored[key].write_bytes(original[key])
    assert refused > inputs // 3
    assert tried(name, tmp_path)[0] is not None  # the last one is whole again


# Configurations ---------------------------------------------------------------------------------


def test_damaged_configurations(tmp_path, inputs, monkeypatch):
    """A configuration, or an error that names the file."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "study.toml"
    texts = [config.read_bytes() for config in CONFIGS]
    rng, refused = random.Random("configurations"), 0
    for _ in range(max(inputs // 10, 1)):
        path.write_bytes(mutated(rng.choice(texts), rng))
        start = time.monotonic()
        message = ""
        try:
            assert isinstance(load_config(path), CompareConfig)
        except ConfigError as error:
            message = str(error)
            refused += 1
        assert not message or str(path) in message
        assert time.monotonic() - start < SLOWEST
    assert refused > 0
