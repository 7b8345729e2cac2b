"""Two networks for their parameter trees: a ResNet-18 and a small transformer."""

import chex
import jax
import jax.numpy as jnp
from flax import nnx

_STAGES = ((64, 1), (128, 2), (256, 2), (512, 2))  # channels, stride of the first block


class Block(nnx.Module):
    """Two 3x3 convolutions with batch normalisation beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(inputs, outputs, (3, 3), stride, use_bias=False, rngs=rngs)
        self.norm1 = nnx.BatchNorm(outputs, rngs=rngs)
        self.conv2 = nnx.Conv(outputs, outputs, (3, 3), use_bias=False, rngs=rngs)
        self.norm2 = nnx.BatchNorm(outputs, rngs=rngs)
        projection = []
        if stride > 1 or inputs != outputs:
            projection = [
                nnx.Conv(inputs, outputs, (1, 1), stride, use_bias=False, rngs=rngs),
                nnx.BatchNorm(outputs, rngs=rngs),
            ]
        self.projection = nnx.List(projection)

    def __call__(self, signal: chex.Array) -> chex.Array:
        """[B, H, W, inputs] to [B, H/stride, W/stride, outputs]."""
        past = signal
        for layer in self.projection:
            past = layer(past)
        signal = jax.nn.relu(self.norm1(self.conv1(signal)))
        return jax.nn.relu(self.norm2(self.conv2(signal)) + past)


class ResNet18(nnx.Module):
    """ResNet-18 for 32x32 images: a 3x3 stem without pooling; 62 leaves, 11,173,962 parameters.

    References:
      K. He, X. Zhang, S. Ren, J. Sun, "Deep Residual Learning for Image Recognition", CVPR 2016.
    """

    def __init__(self, num_classes: int = 10, *, rngs: nnx.Rngs) -> None:
        self.stem = nnx.Conv(3, 64, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(64, rngs=rngs)
        blocks, inputs = [], 64
        for channels, stride in _STAGES:
            blocks += [
                Block(inputs, channels, stride, rngs=rngs),
                Block(channels, channels, 1, rngs=rngs),
            ]
            inputs = channels
        self.blocks = nnx.List(blocks)
        self.output = nnx.Linear(inputs, num_classes, rngs=rngs)

    def __call__(self, images: chex.Array) -> chex.Array:
        """Logits [B, classes] of float images [B, 32, 32, 3]."""
        signal = jax.nn.relu(self.norm(self.stem(images)))
        for block in self.blocks:
            signal = block(signal)
        return self.output(jnp.mean(signal, axis=(1, 2)))


class Layer(nnx.Module):
    """Causal self-attention and a feed-forward network, each after layer normalisation."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs) -> None:
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads=heads, in_features=width, decode=False, rngs=rngs
        )
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.inner = nnx.Linear(width, 4 * width, rngs=rngs)
        self.outer = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, signal: chex.Array) -> chex.Array:
        """[B, T, width] to the same."""
        mask = nnx.make_causal_mask(signal[..., 0])
        signal += self.attention(self.norm1(signal), mask=mask)
        return signal + self.outer(jax.nn.gelu(self.inner(self.norm2(signal))))


class Transformer(nnx.Module):
    """A decoder of six layers, 256 wide, with tied embeddings: 100 leaves, 6,868,992 parameters.

    References:
      A. Radford, J. Wu, R. Child, D. Luan, D. Amodei, I. Sutskever, "Language Models are
      Unsupervised Multitask Learners", 2019.
    """

    def __init__(
        self,
        vocabulary: int = 8192,
        context: int = 128,
        width: int = 256,
        layers: int = 6,
        heads: int = 8,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        self.tokens = nnx.Embed(vocabulary, width, rngs=rngs)
        self.positions = nnx.Embed(context, width, rngs=rngs)
        self.layers = nnx.List([Layer(width, heads, rngs=rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, tokens: chex.Array) -> chex.Array:
        """Logits [B, T, vocabulary] of tokens [B, T], integers."""
        signal = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        for layer in self.layers:
            signal = layer(signal)
        return self.tokens.attend(self.norm(signal))
