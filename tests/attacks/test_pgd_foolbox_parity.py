"""Without a random start, PGD takes the very steps of foolbox."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrd import ThreatModel, attacks, objectives

foolbox = pytest.importorskip("foolbox", reason="parity with foolbox needs foolbox, which jaxrd does not")

GENERATOR = np.random.default_rng(0)
IMAGES = jnp.asarray(GENERATOR.uniform(size=(12, 6, 6, 3)), jnp.float32)
LABELS = jnp.asarray(GENERATOR.integers(0, 4, 12))
KERNEL = jnp.asarray(0.3 * GENERATOR.normal(size=(3, 3, 3, 8)), jnp.float32)
DENSE = jnp.asarray(0.3 * GENERATOR.normal(size=(6 * 6 * 8, 4)), jnp.float32)


@jax.jit
def logits_fn(images):
    features = jax.lax.conv_general_dilated(images, KERNEL, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jnp.tanh(features).reshape(len(images), -1) @ DENSE


def theirs(attack, epsilon):
    model = foolbox.JAXModel(logits_fn, bounds=(0, 1))
    raw, _, _ = attack(model, IMAGES, LABELS, epsilons=epsilon)
    return raw


def ours(norm, epsilon, step_size, steps):
    return attacks.pgd(
        jax.random.key(0), lambda images: objectives.cross_entropy(logits_fn(images), LABELS), IMAGES,
        threat=ThreatModel(norm, epsilon), step_size=step_size, steps=steps, start="none")


@pytest.mark.parametrize("norm, attack, epsilon, step_size", [
    ("linf", "LinfPGD", 8 / 255, 2 / 255),
    ("linf", "LinfPGD", 0.2, 0.05),  # much of it outside the box, before projection
    ("l2", "L2PGD", 0.3, 0.1),
    ("l2", "L2PGD", 3.0, 0.7),
])
@pytest.mark.parametrize("steps", [1, 7])
def test_pgd(norm, attack, epsilon, step_size, steps):
    attack = getattr(foolbox.attacks, attack)(abs_stepsize=step_size, steps=steps, random_start=False)
    expected = theirs(attack, epsilon)
    assert jnp.abs(expected - IMAGES).max() > step_size / 20
    np.testing.assert_allclose(ours(norm, epsilon, step_size, steps), expected, atol=1e-6)


def test_fgsm():
    attack = foolbox.attacks.LinfFastGradientAttack(random_start=False)
    np.testing.assert_allclose(ours("linf", 0.05, 0.05, 1), theirs(attack, 0.05), atol=1e-6)
