"""Networks whose derivatives are known, as functions images -> logits; in float64 under `jax.enable_x64`."""

import jax.numpy as jnp
import numpy as np

BATCH, SHAPE, CLASSES = 5, (3, 2, 2), 4
SIZE = int(np.prod(SHAPE))
GENERATOR = np.random.default_rng(0)
IMAGES = GENERATOR.uniform(size=(BATCH, *SHAPE))
DELTAS = 0.3 * GENERATOR.normal(size=(BATCH, *SHAPE))
LABELS = GENERATOR.integers(0, CLASSES, BATCH)
WEIGHTS, BIAS = GENERATOR.normal(size=(SIZE, CLASSES)), GENERATOR.normal(size=CLASSES)
HALF = GENERATOR.normal(size=(CLASSES, SIZE, SIZE))
HESSIANS = HALF + np.swapaxes(HALF, 1, 2)  # one for each logit
HIDDEN, OUT = GENERATOR.normal(size=(SIZE, 8)) / 3, GENERATOR.normal(size=(8, CLASSES))


def flat(images):
    return images.reshape(len(images), -1)


def linear(images):
    return flat(images) @ WEIGHTS.astype(images.dtype) + BIAS.astype(images.dtype)


def quadratic(images):
    return linear(images) + jnp.einsum("bi,cij,bj->bc", flat(images), HESSIANS.astype(images.dtype), flat(images)) / 2


def smooth(images):
    return jnp.tanh(flat(images) @ HIDDEN.astype(images.dtype)) @ OUT.astype(images.dtype)


def quadratic_jacobian(images):
    """[batch, classes, h, w, c], by hand."""
    rows = WEIGHTS.T + np.einsum("cij,bj->bci", HESSIANS, flat(images))
    return rows.reshape(len(images), CLASSES, *SHAPE)
