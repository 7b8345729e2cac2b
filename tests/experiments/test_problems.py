"""Batches, augmentation, the loss and its evaluation: what the engine is handed."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from optgrad.experiments import data, models, problems
from optgrad.experiments.problems import augment_images, epoch_indices, image_classification

HIDDEN = {"hidden": (5,)}


@functools.cache
def dataset(train=25, validation=0, test=23):
    """Random images of two channels with very different statistics; the labels are arbitrary."""
    random = np.random.RandomState(0)
    total = train + validation + test
    images = np.stack(
        [random.randint(0, 256, (total, 3, 4)), random.randint(100, 110, (total, 3, 4))], axis=-1
    ).astype(np.uint8)
    labels = random.randint(0, 4, total).astype(np.int32)
    a, b = train, train + validation
    return data.Dataset(
        "synthetic",
        *(images[:a], labels[:a], images[b:], labels[b:]),
        classes=tuple("abcd"),
        validation_images=images[a:b],
        validation_labels=labels[a:b],
    )


@functools.cache
def problem(l2=0.0, augment=(), evaluation_batch=10, validation=0):
    return image_classification(
        dataset(validation=validation),
        "mlp",
        batch_size=6,
        augment=augment,
        l2=l2,
        model_options=HIDDEN,
        evaluation_batch=evaluation_batch,
    )


@functools.cache
def parameters():
    """With biases that are not zero, so that it matters whether they are regularised."""
    leaves, tree = jax.tree.flatten(problem().init(jax.random.key(1)))
    values = [leaf + 0.1 * np.cos(np.arange(leaf.size)).reshape(leaf.shape) for leaf in leaves]
    return jax.tree.unflatten(tree, [jnp.asarray(v, jnp.float32) for v in values])


def logits_by_hand(params, images):
    """Float64 NumPy transcription of the two-layer network."""
    signal = np.asarray(images, np.float64).reshape(len(images), -1)
    for i, layer in sorted(params["layers"].items()):
        signal = np.maximum(signal, 0) if i else signal
        kernel, bias = (np.asarray(layer[k][...], np.float64) for k in ("kernel", "bias"))
        signal = signal @ kernel + bias
    return signal


def cross_entropies_by_hand(params, images, labels):
    logits = logits_by_hand(params, images)
    logits -= logits.max(axis=1, keepdims=True)
    log_likelihood = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return -log_likelihood[np.arange(len(labels)), labels]


def normalised(images, source=None):
    """By the training images' statistics per channel, in float64."""
    train = (source or dataset()).train_images.astype(np.float64)
    return (images - train.mean(axis=(0, 1, 2))) / train.std(axis=(0, 1, 2))


# Epochs and batches ---------------------------------------------------------------------------

COUNT, BATCH, PER_EPOCH = 25, 6, 4  # 25 // 6 = 4 batches; one image is left out of each epoch


@functools.partial(jax.jit, static_argnums=2)
def rows_of(seed, first, num):
    return epoch_indices(jax.random.key(seed), first + jnp.arange(num), num, COUNT, BATCH)


def test_each_epoch_is_another_permutation():
    rows = np.asarray(rows_of(3, 0, 5 * PER_EPOCH))
    assert rows.shape == (20, BATCH)
    epochs = rows.reshape(5, PER_EPOCH * BATCH)
    for epoch in epochs:
        assert len(set(epoch.tolist())) == PER_EPOCH * BATCH  # without replacement
        assert set(epoch.tolist()) < set(range(COUNT))
    for one, other in itertools.combinations(epochs, 2):
        assert (one != other).any()
    left_out = {(set(range(COUNT)) - set(epoch.tolist())).pop() for epoch in epochs}
    assert len(left_out) > 1  # not always the same image


@pytest.mark.parametrize("num", [1, 3, 9])
def test_rows_do_not_depend_on_the_interval_that_asks(num):
    whole = np.asarray(rows_of(3, 0, 18))
    parts = [np.asarray(rows_of(3, first, num)) for first in range(0, 18, num)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_rows_are_a_function_of_the_key():
    same, other = np.asarray(rows_of(3, 40, 9)), np.asarray(rows_of(4, 40, 9))
    np.testing.assert_array_equal(np.asarray(rows_of(3, 40, 9)), same)
    assert (same != other).any()


def test_one_batch_may_be_the_whole_set():
    rows = epoch_indices(jax.random.key(0), 5 + jnp.arange(3), 3, 7, 7)
    assert np.sort(rows, axis=1).tolist() == [list(range(7))] * 3


def test_batches_are_a_function_of_seed_and_step():
    one = problem(augment=("crop", "mirror"))
    draw = jax.jit(one.batches, static_argnums=3)
    build = jax.jit(jax.vmap(one.batch, in_axes=(None, 0)))
    key = jax.random.key(5)
    whole = build(one.data, draw(one.data, key, 0, 6))
    assert whole.images.shape == (6, 6, 3, 4, 2)
    assert whole.images.dtype == jnp.float32
    assert whole.labels.shape == (6, 6)
    for first in (0, 2, 4):
        part = build(one.data, draw(one.data, key, first, 2))
        np.testing.assert_array_equal(part.images, whole.images[first : first + 2])
        np.testing.assert_array_equal(part.labels, whole.labels[first : first + 2])
    other = build(one.data, draw(one.data, jax.random.key(6), 0, 6))
    assert (other.labels != whole.labels).any()


def test_batches_hold_the_images_that_were_drawn_normalised():
    one = problem()
    indices, keys = one.batches(one.data, jax.random.key(5), 0, 3)
    batch = one.batch(one.data, (indices[1], keys[1]))
    rows = np.asarray(indices[1])
    np.testing.assert_array_equal(batch.labels, dataset().train_labels[rows])
    np.testing.assert_allclose(
        batch.images, normalised(dataset().train_images[rows]), rtol=1e-4, atol=1e-4
    )


def test_normalised_training_images_have_mean_zero_and_variance_one():
    one = image_classification(dataset(), "mlp", batch_size=25, model_options=HIDDEN)
    drawn = jax.tree.map(lambda x: x[0], one.batches(one.data, jax.random.key(0), 0, 1))
    images = np.asarray(one.batch(one.data, drawn).images, np.float64)  # all of them
    np.testing.assert_allclose(images.mean(axis=(0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(images.std(axis=(0, 1, 2)), 1, rtol=1e-4)


def test_the_images_stay_bytes_and_are_no_constants():
    one = problem(validation=8)
    for name in ("train", "validation", "test"):
        assert one.data[name][0].dtype == jnp.uint8
    # Other images of the same shape, the same function: nothing of the data is compiled in.
    indices = jnp.arange(6)
    inverted = {**one.data, "train": (255 - one.data["train"][0], one.data["train"][1])}
    key = jax.random.key(0)
    batch, other = (one.batch(d, (indices, key)).images for d in (one.data, inverted))
    raw = np.asarray(one.data["train"][0][:6], np.float64)
    scale = np.asarray(one.data["scale"], np.float64)
    np.testing.assert_allclose(np.asarray(other - batch), (255 - 2 * raw) * scale, rtol=1e-3)


def test_normalisation_uses_the_training_images_alone():
    split = dataset().split_validation(5)
    one = image_classification(split, "mlp", batch_size=6, model_options=HIDDEN)
    np.testing.assert_allclose(one.data["mean"], split.train_images.mean(axis=(0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(
        1 / one.data["scale"], split.train_images.astype(float).std(axis=(0, 1, 2)), rtol=1e-5
    )
    assert len(one.data["validation"][1]) == 5


# Augmentation ---------------------------------------------------------------------------------


def numbered_images(count=40, height=9, width=10):
    """Positive and all different, so that a pixel tells where it came from; zero is padding."""
    size = count * height * width
    return jnp.arange(1.0, size + 1).reshape(count, height, width, 1)


def test_no_options_change_nothing():
    images = numbered_images()
    np.testing.assert_array_equal(augment_images(jax.random.key(0), images, ()), images)


def test_mirror_flips_each_image_or_leaves_it():
    images = np.asarray(numbered_images())
    mirrored = np.asarray(augment_images(jax.random.key(0), jnp.asarray(images), ("mirror",)))
    assert mirrored.shape == images.shape
    flipped = [np.array_equal(new, old[:, ::-1]) for new, old in zip(mirrored, images, strict=True)]
    kept = [np.array_equal(new, old) for new, old in zip(mirrored, images, strict=True)]
    assert all(f != k for f, k in zip(flipped, kept, strict=True))
    assert 8 < sum(flipped) < 32  # of 40: each on its own


def origins(augmented, images):
    """(down, right, flipped) for each augmented image: where in the padded original it lies."""
    _, height, width, _ = images.shape
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    found = []
    for new, old in zip(np.asarray(augmented), padded, strict=True):
        matches = [
            (down - 4, right - 4, flip)
            for down, right, flip in itertools.product(range(9), range(9), (False, True))
            if np.array_equal(
                new[:, :: -1 if flip else 1], old[down : down + height, right : right + width]
            )
        ]
        assert len(matches) == 1
        found += matches
    return found


@pytest.mark.parametrize("options", [("crop",), ("mirror", "crop")])
def test_crop_shifts_each_image_by_up_to_four_pixels_and_zeros_come_in(options):
    images = numbered_images()
    cropped = augment_images(jax.random.key(1), images, options)
    assert cropped.shape == images.shape
    found = origins(cropped, np.asarray(images))
    down, right, flipped = (set(column) for column in zip(*found, strict=True))
    assert {min(down), max(down), min(right), max(right)} == {-4, 4}
    assert len(set(found)) > 20  # of 40: each on its own
    assert flipped == ({False, True} if "mirror" in options else {False})


def test_augmentation_is_a_function_of_the_key():
    images = numbered_images()
    options = ("crop", "mirror")
    same = augment_images(jax.random.key(2), images, options)
    np.testing.assert_array_equal(augment_images(jax.random.key(2), images, options), same)
    assert (augment_images(jax.random.key(3), images, options) != same).any()


def test_augmentation_of_a_step_does_not_repeat():
    """The same image drawn at two steps is shifted differently; labels are left alone."""
    one = problem(augment=("crop",))
    _, keys = one.batches(one.data, jax.random.key(0), 0, 2)
    rows = jnp.arange(6)
    first, second = (one.batch(one.data, (rows, keys[i])) for i in range(2))
    assert (first.images != second.images).any()
    np.testing.assert_array_equal(first.labels, second.labels)


def test_evaluation_is_not_augmented():
    plain, augmented = problem(), problem(augment=("crop", "mirror"))
    sums = [one.evaluate(parameters(), one.data, "test", 0)["loss"] for one in (plain, augmented)]
    np.testing.assert_array_equal(*sums)


# Loss and evaluation --------------------------------------------------------------------------


def some_batch(one):
    return one.batch(one.data, (jnp.arange(6), jax.random.key(0)))


@pytest.mark.parametrize("l2", [0.0, 0.3])
def test_loss_by_hand_regularises_weights_and_not_biases(l2):
    params = parameters()
    batch = some_batch(problem(l2))
    rows = dataset().train_images[:6], dataset().train_labels[:6]
    expected = cross_entropies_by_hand(params, normalised(rows[0]), rows[1]).mean()
    weights = sum(
        np.sum(np.asarray(layer["kernel"][...], np.float64) ** 2)
        for layer in params["layers"].values()
    )
    assert weights > 1
    np.testing.assert_allclose(
        problem(l2).loss(params, batch), expected + 0.5 * l2 * weights, rtol=1e-5
    )


def test_l2_does_not_pull_at_the_biases():
    params = parameters()
    batch = some_batch(problem())
    plain, regularised = (jax.grad(problem(l2).loss)(params, batch) for l2 in (0.0, 0.3))
    for i, layer in params["layers"].items():
        pull = jax.tree.map(lambda a, b: a - b, regularised["layers"][i], plain["layers"][i])
        np.testing.assert_allclose(pull["kernel"][...], 0.3 * layer["kernel"][...], atol=1e-5)
        np.testing.assert_allclose(pull["bias"][...], 0, atol=1e-6)


def test_convolution_kernels_are_regularised_too():
    """Weights are told from biases by their axes, which a convolution has four of."""
    images = np.zeros((4, 9, 9, 1), np.uint8)
    labels = np.zeros(4, np.int32)
    one = image_classification(
        data.Dataset("black", images, labels, images, labels, ("a", "b")),
        "all_cnn_c",
        batch_size=2,
        l2=2.0,
        model_options={"width": 1},
    )
    shapes = jax.eval_shape(one.init, jax.random.key(0))
    params = jax.tree.map(lambda s: jnp.full(s.shape, 0.5 if len(s.shape) > 1 else 0.0), shapes)
    batch = problems.Batch(jnp.zeros((2, 9, 9, 1)), jnp.zeros(2, jnp.int32))
    count = sum(s.size for s in jax.tree.leaves(shapes) if len(s.shape) > 1)
    # Black images and no biases: all logits are zero, whatever the kernels.
    np.testing.assert_allclose(one.loss(params, batch), np.log(2) + 0.25 * count, rtol=1e-6)


@pytest.mark.parametrize("l2", [0.0, 0.3])
def test_loss_is_the_mean_of_example_loss(l2):
    one = problem(l2)
    batch = some_batch(one)
    values = jax.vmap(one.example_loss, in_axes=(None, 0))(parameters(), batch)
    assert values.shape == (6,)
    np.testing.assert_allclose(one.loss(parameters(), batch), values.mean(), rtol=1e-6)
    grads = jax.vmap(jax.grad(one.example_loss), in_axes=(None, 0))(parameters(), batch)
    jax.tree.map(
        lambda g, each: np.testing.assert_allclose(g, each.mean(axis=0), rtol=1e-4, atol=1e-6),
        jax.grad(one.loss)(parameters(), batch),
        grads,
    )


@pytest.mark.parametrize("evaluation_batch", [1, 10, 23, 1000])
def test_evaluation_sums_equal_a_direct_computation(evaluation_batch):
    """23 test images: batches of 10 end with one of 3, and one of 1000 is mostly padding."""
    one = problem(l2=0.3, evaluation_batch=evaluation_batch)
    assert one.splits == {"test": -(-23 // evaluation_batch)}
    evaluate = jax.jit(one.evaluate, static_argnums=2)
    parts = [evaluate(parameters(), one.data, "test", i) for i in range(one.splits["test"])]
    sums = {name: sum(float(part[name]) for part in parts) for name in parts[0]}
    images, labels = normalised(dataset().test_images), dataset().test_labels
    logits = logits_by_hand(parameters(), images)
    assert sums["count"] == 23
    assert sums["accuracy"] == np.sum(logits.argmax(axis=1) == labels)
    np.testing.assert_allclose(  # without the L2 term
        sums["loss"], cross_entropies_by_hand(parameters(), images, labels).sum(), rtol=1e-5
    )


def test_splits_are_evaluated_on_their_own_images():
    one = problem(validation=8, evaluation_batch=10)
    assert one.splits == {"validation": 1, "test": 3}
    source = dataset(validation=8)
    images, labels = source.validation
    sums = one.evaluate(parameters(), one.data, "validation", 0)
    assert sums["count"] == 8
    expected = cross_entropies_by_hand(parameters(), normalised(images, source), labels)
    np.testing.assert_allclose(sums["loss"], expected.sum(), rtol=1e-4)


def test_initialisation_is_the_networks():
    params = problem().init(jax.random.key(7))
    module = models.create_model("mlp", (3, 4, 2), 4, nnx.Rngs(jax.random.key(7)), hidden=(5,))
    jax.tree.map(np.testing.assert_array_equal, params, nnx.state(module, nnx.Param))


def test_name_and_convolutions():
    assert problem().name == "mlp on synthetic"
    assert not problem().has_convolutions
    images, labels = np.zeros((4, 9, 9, 1), np.uint8), np.zeros(4, np.int32)
    black = data.Dataset("black", images, labels, images, labels, ("a", "b"))
    options = {"channels": (1, 1, 1), "hidden": (2,)}
    assert image_classification(
        black, "cifar10_cnn", batch_size=2, model_options=options
    ).has_convolutions


# Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, r"batch_size = 0 is outside its range \[1, 25\]"),
        ({"batch_size": 26}, ValueError, r"batch_size = 26 is outside its range \[1, 25\]"),
        ({"l2": -0.1}, ValueError, r"l2 = -0.1 is outside its range \[0, inf\)"),
        ({"l2": float("nan")}, ValueError, r"l2 = nan"),
        ({"augment": ("flip",)}, ValueError, r"augment = 'flip' .*Accepted: 'crop', 'mirror'"),
        ({"model": "mpl"}, ValueError, r"= 'mpl' is not accepted; did you mean 'mlp'"),
        ({"model": "mlp_small", "model_options": {"hiden": (3,)}}, TypeError,
         r"hiden is not an option of 'mlp_small'; did you mean 'hidden'"),
        ({"model_options": {"hidden": (0,)}}, ValueError, r"hidden = \(0,\)"),
    ],
)  # fmt: skip
def test_refusals_name_the_argument(arguments, error, message):
    given = {"model": "mlp", "batch_size": 6, "model_options": HIDDEN, **arguments}
    with pytest.raises(error, match=message):
        image_classification(dataset(), **given)
