"""Small models of text that every Python brings along: the topics of its ``help()``."""

import collections
import functools
import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx

from optgrad.core import checks
from optgrad.experiments.classification import cross_entropy
from optgrad.experiments.function_problems import keys_of_steps
from optgrad.experiments.problems import Problem
from optgrad.experiments.scores import LOSS

_SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}  # consecutive parts of the text
_EVALUATED = 2048  # windows of each part, at most
_AT_ONCE = 256


class Text(NamedTuple):
    """A text as symbols, numbers from 0 to ``size`` − 1."""

    symbols: npt.NDArray[np.int32]
    size: int


def attention(
    *,
    batch_size: int = 1,
    context: int = 32,
    width: int = 32,
    heads: int = 2,
    layers: int = 1,
) -> Problem:
    """A causal transformer that predicts the next character of Python's help texts.

    Characters and positions are embedded; each block is attention and a network of one hidden
    layer, both behind a layer normalisation and beside a shortcut.

    Args:
      batch_size: windows per step, at random places of the text, B ≥ 1.
      context: characters in a window, ≥ 1.
      width: of embeddings and blocks, a multiple of ``heads``; the hidden layers are 4 times wider.
      heads: of attention, ≥ 1.
      layers: blocks, ≥ 1.

    Returns:
      The problem, judged by its test loss in nats per character. The text is that of the running
      Python: compare numbers of one minor version only.

    Raises:
      TypeError, ValueError: for an argument outside its range.
    """
    for name, value in (("context", context), ("layers", layers), ("heads", heads)):
        checks.check_count(name, value, 1)
    checks.check_count("width", width, 1)
    if width % heads:
        raise ValueError(f"width = {width}, heads = {heads}; accepted: a width that they divide")
    text = _characters()
    return _next_symbol(
        f"attention on {_source()}",
        text,
        lambda rngs: _Transformer(text.size, context, width, heads, layers, rngs=rngs),
        batch_size,
        context,
        predicts_all=True,
    )


def embedding(*, batch_size: int = 1, context: int = 4, width: int = 32) -> Problem:
    """The next word of Python's help texts from the mean of the last words' embeddings.

    Most words are in few batches: the gradients of their rows are exactly 0 in all others.

    Args:
      batch_size: windows per step, at random places of the text, B ≥ 1.
      context: words before the one that is predicted, ≥ 1.
      width: of an embedding, ≥ 1.

    Returns:
      The problem, judged by its test loss in nats per word. The text is that of the running
      Python: compare numbers of one minor version only.

    Raises:
      TypeError, ValueError: for an argument outside its range.
    """
    checks.check_count("context", context, 1)
    checks.check_count("width", width, 1)
    text = _words()
    return _next_symbol(
        f"word embeddings on {_source()}",
        text,
        lambda rngs: _MeanOfWords(text.size, width, rngs),
        batch_size,
        context,
        predicts_all=False,
    )


# Text -------------------------------------------------------------------------------------------


def _source() -> str:
    return f"the help of Python {sys.version_info.major}.{sys.version_info.minor}"


@functools.cache
def _help() -> str:
    from pydoc_data import topics  # noqa: PLC0415  half a megabyte, for these problems only

    return "\n".join(text for _, text in sorted(topics.topics.items()))


@functools.cache
def _characters(least: int = 20) -> Text:
    """Of those that occur less often than that, one symbol."""
    return _symbols(list(_help()), least)


@functools.cache
def _words(least: int = 10) -> Text:
    """Words and punctuation marks; of those that occur less often than that, one symbol."""
    return _symbols(re.findall(r"\w+|[^\w\s]", _help().lower()), least)


def _symbols(tokens: list[str], least: int) -> Text:
    counts = collections.Counter(tokens)
    known = {token: i for i, (token, n) in enumerate(counts.most_common()) if n >= least}
    symbols = np.array([known.get(token, len(known)) for token in tokens], np.int32)
    return Text(symbols, len(known) + 1)


# Models -----------------------------------------------------------------------------------------


class _Block(nnx.Module):
    """Attention and a hidden layer, each normalised before and added after."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs) -> None:
        self.first = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.second = nnx.LayerNorm(width, rngs=rngs)
        self.hidden = nnx.Linear(width, 4 * width, rngs=rngs)
        self.out = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: chex.Array, mask: chex.Array) -> chex.Array:
        x = x + self.attention(self.first(x), mask=mask)
        new: chex.Array = x + self.out(nnx.gelu(self.hidden(self.second(x))))
        return new


class _Transformer(nnx.Module):
    """Symbols [B, T] -> logits of the symbol after each of them [B, T, C]."""

    def __init__(
        self, size: int, context: int, width: int, heads: int, layers: int, *, rngs: nnx.Rngs
    ) -> None:
        self.symbols = nnx.Embed(size, width, rngs=rngs)
        self.positions = nnx.Embed(context, width, rngs=rngs)
        for i in range(layers):
            setattr(self, f"block{i}", _Block(width, heads, rngs))
        self.last = nnx.LayerNorm(width, rngs=rngs)
        self.out = nnx.Linear(width, size, rngs=rngs)
        self.layers = layers

    def __call__(self, symbols: chex.Array) -> chex.Array:
        x = self.symbols(symbols) + self.positions(jnp.arange(symbols.shape[-1]))
        mask = nnx.make_causal_mask(symbols)
        for i in range(self.layers):
            x = getattr(self, f"block{i}")(x, mask)
        logits: chex.Array = self.out(self.last(x))
        return logits


class _MeanOfWords(nnx.Module):
    """Symbols [B, T] -> logits of the symbol after the last [B, 1, C]."""

    def __init__(self, size: int, width: int, rngs: nnx.Rngs) -> None:
        self.words = nnx.Embed(size, width, rngs=rngs)
        self.out = nnx.Linear(width, size, rngs=rngs)

    def __call__(self, symbols: chex.Array) -> chex.Array:
        logits: chex.Array = self.out(jnp.mean(self.words(symbols), axis=-2, keepdims=True))
        return logits


# The problem ------------------------------------------------------------------------------------


def _next_symbol(
    name: str,
    text: Text,
    build: Callable[[nnx.Rngs], nnx.Module],
    batch_size: int,
    context: int,
    *,
    predicts_all: bool,
) -> Problem:
    """Cross-entropy of the symbol after each of a window's, or after the last one only."""
    checks.check_count("batch_size", batch_size, 1)
    length = context + 1
    parts = _parts(text.symbols)
    graph, _ = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))), nnx.Param)
    windows = {part: _windows(parts[part], length) for part in ("validation", "test")}
    data = {"train": jnp.asarray(parts["train"]), **{k: jnp.asarray(v) for k, v in windows.items()}}
    places = len(parts["train"]) - length + 1

    def batch(data: Any, key: chex.PRNGKey) -> chex.Array:
        """Windows [B, context + 1]."""
        first = jax.random.randint(key, (batch_size, 1), 0, places)
        found: chex.Array = data["train"][first + jnp.arange(length)]
        return found

    def targets(windows: chex.Array) -> chex.Array:
        return windows[:, 1:] if predicts_all else windows[:, -1:]

    def outputs(params: Any, windows: chex.Array) -> chex.Array:
        logits: chex.Array = nnx.merge(graph, params)(windows[:, :-1])
        return logits

    def window_losses(logits: chex.Array, windows: chex.Array) -> chex.Array:
        return jnp.mean(cross_entropy_of(logits, targets(windows)), axis=-1)

    def loss(params: Any, windows: chex.Array) -> chex.Array:
        return out_loss(outputs(params, windows), windows)

    def out_loss(logits: chex.Array, windows: chex.Array) -> chex.Array:
        return jnp.mean(window_losses(logits, windows))

    def evaluate(params: Any, data: Any, split: str, index: chex.Numeric) -> dict[str, chex.Array]:
        rows = index * _AT_ONCE + jnp.arange(_AT_ONCE)
        inside = rows < len(data[split])  # the last batch repeats the last window with weight 0
        chosen = data[split][jnp.minimum(rows, len(data[split]) - 1)]
        losses = window_losses(outputs(params, chosen), chosen)
        return {
            "loss": jnp.sum(jnp.where(inside, losses, 0.0)),
            "count": jnp.sum(inside).astype(losses.dtype),
        }

    return Problem(
        name=name,
        data=data,
        init=lambda key: nnx.split(build(nnx.Rngs(key)), nnx.Param)[1],
        batches=keys_of_steps,
        batch=batch,
        loss=loss,
        example_loss=lambda params, window: loss(params, window[None]),
        splits={part: -(-len(found) // _AT_ONCE) for part, found in windows.items()},
        evaluate=evaluate,
        outputs=outputs,
        out_loss=out_loss,
        score=LOSS,
    )


def cross_entropy_of(logits: chex.Array, symbols: chex.Array) -> chex.Array:
    """Of each symbol, shapes (B, T, C) and (B, T) -> (B, T)."""
    return jax.vmap(cross_entropy)(logits, symbols)


def _parts(symbols: npt.NDArray[np.int32]) -> dict[str, npt.NDArray[np.int32]]:
    """The text, divided into consecutive parts."""
    ends = np.round(np.cumsum(list(_SHARES.values())) * len(symbols)).astype(int)
    return dict(zip(_SHARES, np.split(symbols, ends[:-1]), strict=True))


def _windows(symbols: npt.NDArray[np.int32], length: int) -> npt.NDArray[np.int32]:
    """Windows that do not overlap, spread over the text; shape (windows, length)."""
    count = len(symbols) // length
    found = symbols[: count * length].reshape(count, length)
    chosen = np.linspace(0, count - 1, min(count, _EVALUATED)).astype(int)
    return np.asarray(found[chosen])
