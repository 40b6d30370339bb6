"""Programs are compiled for what is fast on the backend, and asking for that starts nothing before it is time."""

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrd import ThreatModel, compilation, distillation, models
from jaxrd.training import parallel, state as states, step


def test_importing_starts_no_backend():
    program = ("import jaxrd, jaxrd.evaluation.evaluate, jaxrd.training.loop; from jax._src import xla_bridge; "
               "assert not xla_bridge.backends_are_initialized()")
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_jit_is_jax_jit_with_options():
    traces = []

    @compilation.jit
    def twice(x):
        traces.append(x.shape)
        return 2 * x

    assert twice.__name__ == "twice" and twice(3) == 6 and twice(4) == 8 and len(traces) == 1
    power = compilation.jit(lambda n, x: x**n, static_argnums=0)
    assert power(3, 2.0) == 8.0
    donating = compilation.jit(lambda x: x + 1, donate_argnums=0)
    given = jnp.ones(3)
    np.testing.assert_array_equal(donating(given), np.full(3, 2.0))
    assert given.is_deleted()
    assert isinstance(twice.lower(3), jax.stages.Lowered)
    # Inside of others, where JAX takes no options:
    assert jax.jit(lambda x: twice(x) + 1)(3.0) == 7 and jax.grad(twice)(3.0) == 2 and "mul" in str(jax.make_jaxpr(twice)(3.0))
    np.testing.assert_array_equal(jax.vmap(twice)(jnp.arange(3)), [0, 2, 4])
    assert jax.jit(lambda: twice(3.0))() == 6 and jax.eval_shape(lambda: twice(3.0)).shape == ()  # of constants


def test_an_option_that_the_backend_does_not_know_is_left_out(monkeypatch):
    compilation.options.cache_clear()

    def refuses(*_, compiler_options=None, **__):
        raise RuntimeError(f"no such option: {compiler_options}")

    monkeypatch.setattr(jax, "jit", refuses)
    assert compilation.options() == {}
    monkeypatch.undo()
    compilation.options.cache_clear()
    assert compilation.options()  # the one of today does


def bodies(hlo: str) -> dict[str, str]:
    """Returns the text of each computation of a program by name."""
    return {match[1]: match[0] for match in re.finditer(r"^(?:ENTRY )?%?([\w.-]+) .*?^}", hlo, re.M | re.S)}


@pytest.mark.parametrize("name, accumulation", [("ard+igdm", 1), ("pgd_at", 2)])
def test_on_cpu_no_convolution_is_in_a_loop_nor_on_one_thread(name, accumulation):
    """In loop bodies XLA runs gradients of convolutions 6 to 90 times slower; YNNPACK runs few channels on one thread."""
    method = distillation.method(name)
    model = models.create("resnet6_w4", classes=10, image_shape=(8, 8, 1))
    recipe = step.Recipe(
        method=method, student=model, teacher=model if method.needs_teacher else None, optimizer=optax.sgd(0.1), steps=3,
        inner=distillation.InnerMaximisation(ThreatModel("linf", 0.1), 0.05, 3), accumulation=accumulation)
    mesh = parallel.data_mesh(jax.devices()[:1])
    state = jax.eval_shape(lambda: states.create(model, recipe.optimizer, jax.random.key(0), weight_average=False))
    teacher = jax.eval_shape(model.init, jax.random.key(0)) if recipe.teacher else None
    cut = (8,) if accumulation == 1 else (accumulation, 4)
    batch = {"images": jax.ShapeDtypeStruct((*cut, 8, 8, 1), np.uint8), "labels": jax.ShapeDtypeStruct(cut, np.int32)}
    hlo = step.make_train_step(recipe, mesh).lower(state, teacher, batch).compile().as_text()
    computations = bodies(hlo)
    entry = next(text for text in computations.values() if text.startswith("ENTRY"))
    assert entry.count(" convolution(") > 3 * 2 * 4, "the attack's forwards and backwards are where they are fast"
    assert not re.search(r" while\(.*", entry) or not any(
        " convolution(" in computations[body] for body in re.findall(r"body=%?([\w.-]+)", hlo))
    assert "ynn_fusion" not in hlo
