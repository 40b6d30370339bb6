"""The worst weights nearby: the published procedure in PyTorch, the size of the perturbation, its warm-up."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrd import distillation, objectives
from jaxrd.distillation.weight_perturbation import WeightPerturbation, perturb_weights

GENERATOR = np.random.default_rng(0)
IMAGES, LABELS = GENERATOR.uniform(size=(12, 5, 5, 2)), GENERATOR.integers(0, 4, 12)
PARAMS = {
    "conv": {"kernel": GENERATOR.normal(scale=0.4, size=(3, 3, 2, 6)), "bias": GENERATOR.normal(size=6)},
    "dense": {"kernel": GENERATOR.normal(scale=0.2, size=(6 * 5 * 5, 4)), "bias": GENERATOR.normal(size=4)},
}


def loss(params):
    """The cross-entropy of a convolution and a linear layer."""
    features = jax.lax.conv_general_dilated(
        jnp.asarray(IMAGES, params["conv"]["kernel"].dtype), params["conv"]["kernel"], (1, 1), "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"))
    features = jnp.tanh(features + params["conv"]["bias"]).reshape(len(IMAGES), -1)
    return jnp.mean(objectives.cross_entropy(
        features @ params["dense"]["kernel"] + params["dense"]["bias"], jnp.asarray(LABELS)))


def trees(dtype=jnp.float32):
    """Weights and gradients of the loss."""
    params = jax.tree.map(lambda weight: jnp.asarray(weight, dtype), PARAMS)
    return params, jax.grad(loss)(params)


def kernels(tree):
    return {layer: np.asarray(tree[layer]["kernel"], np.float64) for layer in tree}


@pytest.mark.parametrize("gamma", [0.005, 0.01, 0.5])
def test_parity_with_the_published_procedure_in_torch(gamma):
    """A copy takes one step of SGD uphill; each layer's difference is rescaled to the norm of its weights and added."""
    torch = pytest.importorskip("torch", reason="parity with PyTorch needs torch, which jaxrd does not")

    class Flatten(torch.nn.Module):
        def forward(self, x):
            return x.permute(0, 2, 3, 1).flatten(1)  # as channels-last images are flattened

    model = torch.nn.Sequential(
        torch.nn.Conv2d(2, 6, 3, padding=1), torch.nn.Tanh(), Flatten(), torch.nn.Linear(150, 4)).double()
    names = {"conv": "0", "dense": "3"}
    transposed = {"conv": (3, 2, 0, 1), "dense": (1, 0)}
    model.load_state_dict({
        f"{names[layer]}.{torch_name}": torch.tensor(
            np.ascontiguousarray(weight.transpose(transposed[layer]) if name == "kernel" else weight))
        for layer, weights in PARAMS.items() for name, weight in weights.items()
        for torch_name in ["weight" if name == "kernel" else name]})
    images = torch.tensor(IMAGES).permute(0, 3, 1, 2)

    def torch_loss(model):
        return torch.nn.functional.cross_entropy(model(images), torch.tensor(LABELS))

    proxy = copy.deepcopy(model)
    (-torch_loss(proxy)).backward()
    torch.optim.SGD(proxy.parameters(), lr=0.01).step()
    ascended = dict(proxy.named_parameters())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                difference = ascended[name] - weight
                weight.add_(gamma * weight.norm() / (difference.norm() + 1e-20) * difference)

    with jax.enable_x64(True):
        params, gradients = trees(jnp.float64)
        perturbed = perturb_weights(params, gradients, gamma)
        np.testing.assert_allclose(loss(perturbed), torch_loss(model).item(), rtol=1e-10)
    for layer in PARAMS:
        expected = {name: value.detach().numpy() for name, value in model[int(names[layer])].named_parameters()}
        # The published difference of neighbouring weights is rounded to the weights' precision, not to its own.
        np.testing.assert_allclose(
            perturbed[layer]["kernel"].transpose(transposed[layer]), expected["weight"], rtol=1e-10, atol=1e-12)
        np.testing.assert_array_equal(perturbed[layer]["bias"], expected["bias"])


@pytest.mark.parametrize("gamma", [0.005, 0.5])
@pytest.mark.parametrize("scale", [1e-19, 1e-12, 1.0, 1e12])
def test_each_layer_moves_uphill_by_gamma_of_its_norm_however_large_its_gradient(gamma, scale):
    params, gradients = trees()
    scaled = jax.tree.map(lambda gradient: scale * gradient, gradients)
    perturbed = perturb_weights(params, scaled, gamma)
    steep = kernels(gradients)
    for layer, weight in kernels(params).items():
        step = kernels(perturbed)[layer] - weight
        np.testing.assert_allclose(np.linalg.norm(step), gamma * np.linalg.norm(weight), rtol=1e-4)
        cosine = np.vdot(step, steep[layer]) / (np.linalg.norm(step) * np.linalg.norm(steep[layer]))
        np.testing.assert_allclose(cosine, 1.0, rtol=1e-5)
        np.testing.assert_array_equal(perturbed[layer]["bias"], params[layer]["bias"])


def test_the_loss_rises_as_its_gradient_foretells():
    params, gradients = trees()
    gamma, steep = 1e-3, kernels(gradients)
    foretold = gamma * sum(np.linalg.norm(weight) * np.linalg.norm(steep[layer]) for layer, weight in kernels(params).items())
    assert foretold > 1e-3
    np.testing.assert_allclose(loss(perturb_weights(params, gradients, gamma)) - loss(params), foretold, rtol=0.05)


def test_nothing_moves_at_gamma_0_or_without_a_gradient():
    params, gradients = trees()
    for same in (
            perturb_weights(params, gradients, 0.0), perturb_weights(params, gradients, jnp.float32(0)),
            perturb_weights(params, jax.tree.map(jnp.zeros_like, params), 0.01)):
        jax.tree.map(np.testing.assert_array_equal, same, params)


def test_no_perturbation_in_the_warm_up():
    """10 epochs of 200, of 390 steps each: off up to the last of their steps, on from the next."""
    perturbation, steps = WeightPerturbation(gamma=0.005, warmup=10 / 200), 200 * 390
    size = jax.jit(lambda step: perturbation.size((step + 1) / steps))
    for step, expected in ((0, 0.0), (10 * 390 - 1, 0.0), (10 * 390, 0.005), (steps - 1, 0.005)):
        np.testing.assert_allclose(size(jnp.int32(step)), expected, rtol=1e-6)
    assert WeightPerturbation(0.01).size(jnp.float32(1 / steps)) == jnp.float32(0.01)  # without warm-up from the first step


def test_the_perturbation_follows_its_size():
    params, gradients = trees()
    perturbation = WeightPerturbation(0.01, warmup=0.5)
    at = jax.jit(lambda progress: perturb_weights(params, gradients, perturbation.size(progress)))
    jax.tree.map(np.testing.assert_array_equal, at(0.5), params)
    for layer, weight in kernels(at(0.51)).items():
        np.testing.assert_allclose(
            np.linalg.norm(weight - kernels(params)[layer]), 0.01 * np.linalg.norm(kernels(params)[layer]), rtol=1e-3)


def test_a_method_carries_its_perturbation():
    assert distillation.method("trades+igdm").weight_perturbation is None
    assert distillation.method("trades+igdm+awp").weight_perturbation == WeightPerturbation(0.005, 0.0)
    chosen = distillation.method("trades", awp=0.01, awp_warmup=0.05)
    assert chosen.weight_perturbation == WeightPerturbation(0.01, 0.05) and chosen.name == "trades+awp"
