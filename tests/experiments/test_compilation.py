"""Compiled programs are kept for the next process, and compiling is timed."""

import os
import re
import subprocess
import sys

import jax
import pytest

from optgrad.experiments import compilation


@pytest.fixture
def restored():
    names = [
        "jax_compilation_cache_dir", "jax_compilation_cache_max_size",
        "jax_persistent_cache_min_compile_time_secs",
    ]  # fmt: skip
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_compiling_is_timed():
    before = compilation.seconds()
    assert jax.jit(lambda x: x * 3.0 + 1.0)(2.0) == 7.0
    after = compilation.seconds()
    assert after > before
    assert jax.jit(lambda x: x)(2.0) == 2.0
    jax.jit(lambda x: x * 3.0 + 1.0)
    assert compilation.seconds() - after < after - before + 1.0


def test_a_folder_that_cannot_be_written_is_not_used(tmp_path, monkeypatch, restored):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    (tmp_path / "file").write_text("")
    before = jax.config.jax_compilation_cache_dir
    compilation.cache_on_disk(tmp_path / "file" / "below")
    assert jax.config.jax_compilation_cache_dir == before
    compilation.cache_on_disk(tmp_path / "new")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "new")


def test_the_users_own_folder_has_precedence(tmp_path, monkeypatch, restored):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "own"))
    before = jax.config.jax_compilation_cache_dir
    compilation.cache_on_disk(tmp_path / "new")
    assert jax.config.jax_compilation_cache_dir == before


@pytest.mark.slow
def test_the_second_process_reads_what_the_first_compiled(tmp_path):
    """The same numbers, no new file in the cache, less compiling."""
    command = [
        sys.executable, "-m", "optgrad", "compare", "--optimizers", "adam", "--steps", "20",
        "--seeds", "1", "--rates", "0.01", "--output",
    ]  # fmt: skip
    env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # what is kept is no matter of load
    kept, metrics, spent = [], [], []
    for name in ("first", "second"):
        subprocess.run([*command, tmp_path / name], env=env, check=True, capture_output=True)
        kept.append({p.name for p in (tmp_path / "cache").iterdir() if p.suffix != ".atime"})
        metrics.append((tmp_path / name / "metrics.csv").read_bytes())
        report = (tmp_path / name / "report.md").read_text()
        spent.append(float(re.search(r"([\d.]+) s of compiling", report)[1]))
    assert kept[0]
    assert {x for x in kept[1] if "-atime" not in x} == {x for x in kept[0] if "-atime" not in x}
    assert metrics[0] == metrics[1]
    assert spent[1] < spent[0]


def test_what_a_killed_process_left_is_removed(tmp_path, restored):
    """A program without its time of use, unless another process may be writing it right now."""
    for name in ("whole-cache", "whole-atime", "half-cache", "new-cache"):
        (tmp_path / name).write_bytes(b"")
    os.utime(tmp_path / "half-cache", (0, 0))
    os.utime(tmp_path / "whole-cache", (0, 0))
    compilation.cache_on_disk(tmp_path)
    assert {x.name for x in tmp_path.iterdir()} == {"whole-cache", "whole-atime", "new-cache"}
