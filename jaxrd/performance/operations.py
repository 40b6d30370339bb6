"""Floating-point operations of a train step in closed form: layers of the networks times the passes of the method.

Nothing here looks at XLA, so that its cost analysis (`counting`) and this can be held against each other. A pass over a network
of convolutions and dense layers takes, for an image, with F the operations of its forward pass:

    forward                     F
    gradient to the images      F                 one transposed product for each layer
    gradient to the parameters  2 F - F_stem      one for each kernel, one for each layer's input but the first's

F counts the multiplications and additions whose tap lies inside the image, as XLA does, and the zeros of the padding not; the
usual count takes those too: `Layer.padded`. Normalisation, activations, losses, augmentation and optimiser are not in it: a
fraction of a percent of a ResNet-18's step, a twentieth of the smallest digits networks'. Nor is a second forward pass in place
of stored activations (gradient checkpointing), which the result does not need.

How often a method passes which network is not listed but looked up: the pieces of the step are traced with networks of no
layers that leave a mark where they are forwarded or differentiated, so that a method of one's own is counted too. What cannot
be counted so is a network that is differentiated twice, or forward mode: the gradients that +jvp and +direct match.
"""

import collections
import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp

from jaxrd.models.zoo import Model
from jaxrd.performance import counting, pieces
from jaxrd.training.step import Recipe

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution or dense layer, for one image.

    Attributes:
      kind: "convolution" or "dense".
      shape: of its kernel, as the model has it.
      images: [1, height, width, channels] of what goes into a convolution; [1, features] into a dense layer.
      strides: of the window; () for a dense layer.
      flop: operations, without those on padding.
      padded: operations, with those on padding.
    """

    kind: str
    shape: tuple[int, ...]
    images: tuple[int, ...]
    strides: tuple[int, ...]
    flop: float
    padded: float


@dataclasses.dataclass(frozen=True)
class Passes:
    """How often a network is passed, in batches.

    Attributes:
      forwards: forward passes.
      image_gradients: backward passes to its images.
      parameter_gradients: backward passes to its parameters.
    """

    forwards: float = 0.0
    image_gradients: float = 0.0
    parameter_gradients: float = 0.0

    def flop(self, layers: list[Layer], padded: bool = False) -> float:
        """Returns their operations for one image."""
        sizes = [layer.padded if padded else layer.flop for layer in layers]
        forward = sum(sizes)
        return (self.forwards + self.image_gradients) * forward + self.parameter_gradients * (2 * forward - sum(sizes[:1]))


@dataclasses.dataclass(frozen=True)
class ClosedForm:
    """The operations of a step, for one image.

    Attributes:
      passes: part of the step ("attack", "teacher", "student") -> network ("student", "teacher") -> its passes there.
      flop: by part, without those on padding.
      padded: by part, with those on padding.
    """

    passes: dict[str, dict[str, Passes]]
    flop: dict[str, float]
    padded: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.flop.values())

    @property
    def total_padded(self) -> float:
        return sum(self.padded.values())


def closed_form(recipe: Recipe, rows: dict[str, jax.ShapeDtypeStruct]) -> ClosedForm | None:
    """Returns the operations of a step; None where a method takes derivatives that no layer times passes can tell.

    Args:
      recipe: the run's; how a batch is cut into micro-batches makes no difference.
      rows: the shapes of a batch that is not cut.
    """
    try:
        found = passes(recipe, rows)
    except _NotCounted:
        return None
    layers = {"student": layers_of(recipe.student), "teacher": layers_of(recipe.teacher) if recipe.teacher else []}

    def by_part(padded):
        return {part: sum(of_network.flop(layers[network], padded) for network, of_network in networks.items())
                for part, networks in found.items()}

    return ClosedForm(found, by_part(False), by_part(True))


def layers_of(model: Model) -> list[Layer]:
    """Returns the convolutions and dense layers of a model, in their order, from one forward pass of one image, traced."""
    variables = jax.eval_shape(model.init, jax.random.key(0))
    image = jax.ShapeDtypeStruct((1, *model.image_shape), jnp.float32)
    traced = jax.make_jaxpr(lambda variables, image: model.apply(variables, image, False)[0])(variables, image)
    layers = []
    for equation, times in counting.equations(traced.jaxpr):
        kind = counting.MATRIX_PRIMITIVES.get(equation.primitive.name)
        if kind:
            layers += [(_convolution if kind == "convolution" else _dense)(equation)] * times
    return layers[::-1]


def _convolution(equation) -> Layer:
    images, kernel = (value.aval.shape for value in equation.invars)
    output, parameters = equation.outvars[0].aval.shape, equation.params
    numbers = parameters["dimension_numbers"]
    inside = taps = 1
    for index, padding in enumerate(parameters["padding"]):
        size, window, positions = (
            shape[axes[2 + index]] for shape, axes in ((images, numbers.lhs_spec), (kernel, numbers.rhs_spec),
                                                       (output, numbers.out_spec)))
        taps *= positions * window
        inside *= sum(
            _inside(position * parameters["window_strides"][index] + tap * parameters["rhs_dilation"][index] - padding[0],
                    size, parameters["lhs_dilation"][index])
            for position, tap in itertools.product(range(positions), range(window)))
    # The kernel's input features are those of one group.
    products = output[numbers.out_spec[0]] * output[numbers.out_spec[1]] * kernel[numbers.rhs_spec[1]]
    return Layer("convolution", kernel, images, tuple(parameters["window_strides"]), 2.0 * products * inside,
                 2.0 * products * taps)


def _inside(place: int, size: int, dilation: int) -> bool:
    return 0 <= place < (size - 1) * dilation + 1 and place % dilation == 0


def _dense(equation) -> Layer:
    features, kernel = (value.aval.shape for value in equation.invars)
    (contracted, _), _ = equation.params["dimension_numbers"]
    flop = 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(features[axis] for axis in contracted)
    return Layer("dense", kernel, features, (), flop, flop)


def passes(recipe: Recipe, rows: dict[str, jax.ShapeDtypeStruct]) -> dict[str, dict[str, Passes]]:
    """Returns how often each part of a step passes each network.

    Args:
      recipe, rows: as for `closed_form`.
    """
    marked = _with_marks(recipe)
    state = marked.state_shapes
    teacher = jax.eval_shape(marked.teacher.init, jax.random.key(0)) if marked.teacher else None
    inputs = pieces.of_shapes(marked, state, teacher, rows)
    batch, found = rows["labels"].shape[0], {}
    for part in ("attack", "teacher", "student"):
        if part not in inputs:
            continue
        function, arguments = inputs[part]
        counts = collections.Counter()
        try:
            traced = jax.make_jaxpr(function)(*arguments)
        except TypeError as error:
            if "custom_vjp" in str(error):  # forward mode
                raise _NotCounted from None
            raise
        for equation, times in counting.equations(traced.jaxpr, whole=_is_mark):
            if _is_mark(equation):
                _, network, kind = equation.params["name"].split("/")
                counts[network, kind] += times * _images(kind, equation, recipe.student) / batch
        found[part] = {network: Passes(**{kind: count for (other, kind), count in counts.items() if other == network})
                       for network in sorted({network for network, _ in counts})}
    return found


class _NotCounted(Exception):
    """Derivatives that are not of one forward pass by one backward pass."""


_MARK = "passes"


def _with_marks(recipe: Recipe) -> Recipe:
    """Returns the recipe with networks that compute nothing and leave marks."""
    # A variant of a network, in another dtype or with checkpoints, would be a network of layers again.
    return dataclasses.replace(
        recipe, student=_marked(recipe.student, "student"), teacher=recipe.teacher and _marked(recipe.teacher, "teacher"),
        accumulation=1, attack_dtype=None, gradient_checkpointing=False)


def _marked(model: Model, network: str) -> Model:
    """Returns a model of the same variables, each of whose passes is one compiled function, named after it."""
    def named(kind, function):
        function.__name__ = f"{_MARK}/{network}/{kind}"
        once = jax.custom_jvp(jax.jit(function))
        once.defjvp(_differentiated_twice)
        return once

    def logits(images):  # of the images, so that nothing takes it for a constant
        return jnp.broadcast_to(jnp.sum(images, axis=(1, 2, 3))[:, jnp.newaxis], (images.shape[0], model.classes))

    def of_cotangent(shapes, cotangent):
        return jax.tree.map(lambda leaf: jnp.full(leaf.shape, jnp.sum(cotangent), leaf.dtype), shapes)

    forward = named("forwards", lambda params, images: logits(images))
    to_images = named("image_gradients", lambda images, cotangent: of_cotangent(images, cotangent))
    to_parameters = named("parameter_gradients", lambda params, images, cotangent: of_cotangent(params, cotangent))

    @jax.custom_vjp
    def passed(params, images):
        return forward(params, images)

    def backward(inputs, cotangent):
        return to_parameters(*inputs, cotangent), to_images(inputs[1], cotangent)

    passed.defvjp(lambda *inputs: (forward(*inputs), inputs), backward)

    def apply(variables, images, train, batch_norm_set=0, views=(True,)):
        return passed(variables["params"], images), variables["batch_stats"]

    return dataclasses.replace(model, apply=apply, specification={})


def _differentiated_twice(*_):
    raise _NotCounted


def _is_mark(equation) -> bool:
    return str(equation.params.get("name", "")).startswith(f"{_MARK}/")


def _images(kind: str, equation, model: Model) -> float:
    """Returns how many images a pass is over, whatever axes a transformation has put in front."""
    if kind == "image_gradients":
        return math.prod(equation.outvars[0].aval.shape) / math.prod(model.image_shape)
    logits = equation.outvars[0] if kind == "forwards" else equation.invars[-1]
    return math.prod(logits.aval.shape) / model.classes
