"""The function under attack, as an argument of compiled code: `images -> logits` with its weights as leaves of a pytree.

An attack compiles a few small programs and calls them many times. Were the weights constants of these programs, every model
would be compiled anew and none would be found in the persistent cache; as arguments, one compilation serves all models of an
architecture.
"""

import dataclasses
import inspect
import weakref
from collections.abc import Callable

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxrd.errors import InputError

Array = jax.Array
LogitsFn = Callable[..., Array]  # images [batch, h, w, c] -> logits [batch, classes]; a randomised one takes a key too


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Network:
    """A function `images -> logits` that can be given to compiled code.

    Attributes:
      function: the function, a pytree whose leaves are the arrays that it closed over.
      randomised: whether it takes a key besides the images.
    """

    function: Partial
    randomised: bool = dataclasses.field(default=False, metadata={"static": True})

    def __call__(self, images: Array, keys: Array | None = None) -> Array:
        """Returns the logits, [batch, classes] float32.

        A randomised function sees one image at a time with a key of its own, so that its noise follows the image and not the
        batch that the image came in.

        Args:
          images: [batch, h, w, c].
          keys: [batch] typed keys; read by a randomised function only.
        """
        if self.randomised:
            return jax.vmap(lambda image, key: self.function(image[None], key)[0])(images, keys).astype(jnp.float32)
        return self.function(images).astype(jnp.float32)

    @property
    def leaves(self) -> list[Array]:
        return jax.tree.leaves(self.function)


def as_network(logits_fn: LogitsFn, images: Array) -> Network:
    """Returns `logits_fn` as a `Network`; raises InputError where it does not map such images to [batch, classes] logits.

    A `jax.tree_util.Partial` (what `models.logits_fn` returns) is taken as it is. From any other function, the arrays that it
    closes over are lifted out by tracing it.

    Args:
      logits_fn: images -> logits, or (images, key) -> logits for a randomised defence.
      images: [n, h, w, c]; only the shape is read.
    """
    if isinstance(logits_fn, Network):
        return logits_fn
    if not callable(logits_fn):
        raise InputError(f"logits_fn is a {type(logits_fn).__name__}; give a function images -> logits, such as "
                         "models.logits_fn(model, variables)")
    randomised = _takes_key(logits_fn)
    example = jax.ShapeDtypeStruct((2, *images.shape[1:]), jnp.float32)
    extra = (jax.random.key(0),) * randomised
    try:
        function = logits_fn if isinstance(logits_fn, Partial) else _lift(logits_fn, example, extra)
        logits = jax.eval_shape(lambda *arguments: logits_fn(*arguments), example, *extra)
    except InputError:
        raise
    except Exception as error:  # whatever the user's function raises
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"logits_fn cannot be traced on images {list(example.shape)}: {first}") from error
    shape = getattr(logits, "shape", None)
    if shape is None or len(shape) != 2 or shape[0] != 2 or shape[1] < 2:
        given = f"[{', '.join(['batch', *map(str, shape[1:])])}]" if shape and shape[0] == 2 else shape or type(logits).__name__
        raise InputError(f"logits_fn returns {given} instead of logits [batch, classes >= 2]")
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise InputError(f"logits_fn returns {logits.dtype}, which has no gradient; return floating-point logits")
    network = Network(function, randomised)
    object.__setattr__(network, "_alive", logits_fn)  # outside of the pytree, which compiled code remembers
    return network


logits_of = jax.jit(Network.__call__)


def classes_of(network: Network, images: Array) -> int:
    """Returns the number of logits that the network gives to such images."""
    return jax.eval_shape(network, *_example(images)).shape[1]


def _example(images):
    return jax.ShapeDtypeStruct((2, *images.shape[1:]), jnp.float32), jax.random.split(jax.random.key(0))


def _takes_key(function) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    return sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters) == 2


class _Lifted:
    """A function with the arrays that it closes over as its first argument.

    Two are equal where they are the same function and it is the same program now as it was then: what was compiled for one
    serves the other. The function is held weakly: what compiled code remembers must not keep a model's weights in memory.
    """

    def __init__(self, function, program: str, lifted: tuple[bool, ...]):
        # A bound method is made anew each time that it is asked for.
        self._function = (weakref.WeakMethod if inspect.ismethod(function) else weakref.ref)(function)
        self._program, self._lifted = program, lifted
        self.__name__ = getattr(function, "__name__", type(function).__name__)

    def __hash__(self):
        return hash(self._program)

    def __eq__(self, other):
        if not isinstance(other, _Lifted) or (self._program, self._lifted) != (other._program, other._lifted):
            return False
        function, others = self._function(), other._function()
        return function is not None and (function is others or inspect.ismethod(function) and function == others)

    def __call__(self, weights, *arguments):
        closed = traced(self._function(), arguments)
        weights = iter(weights)
        constants = [next(weights) if lifted else own for lifted, own in zip(self._lifted, closed.consts, strict=True)]
        return jax.extend.core.jaxpr_as_fun(jax.extend.core.ClosedJaxpr(closed.jaxpr, constants))(*arguments)[0]


def _lift(function, example, extra) -> Partial:
    """Returns the function with the arrays that it closes over as leaves, but for those that follow the batch size."""
    closed = traced(function, (example, *extra))
    others = traced(function, (jax.ShapeDtypeStruct((3, *example.shape[1:]), example.dtype), *extra)).consts
    alike = len(others) == len(closed.consts)
    lifted = tuple(alike and _same(a, b) for a, b in zip(closed.consts, others))
    try:
        return Partial(_Lifted(function, str(closed.jaxpr), lifted), [a for a, kept in zip(closed.consts, lifted) if kept])
    except TypeError:
        raise InputError(f"logits_fn is a {type(function).__name__}, which cannot be referred to weakly; wrap it: "
                         "lambda x: f(x)") from None


def _same(a, b) -> bool:
    if a is b:
        return True
    if isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer) or jnp.shape(a) != jnp.shape(b):
        return False
    return bool(np.array_equal(a, b))


def traced(function, arguments):
    """Returns the function as a closed jaxpr whose constants stand at its top, those of jitted functions within it too."""
    # A function of its own each time: jax remembers what it has traced by the function, and weights may have been replaced.
    closed = jax.make_jaxpr(lambda *arguments: function(*arguments))(*arguments)
    if any(inner.consts for inner in _jitted(closed.jaxpr)):
        closed = jax.make_jaxpr(lambda *arguments: _inlined(closed.jaxpr, closed.consts, arguments))(*arguments)
    return closed


def _jitted(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("jit", "pjit"):
            yield equation.params["jaxpr"]
            yield from _jitted(equation.params["jaxpr"].jaxpr)


def _inlined(jaxpr, constants, arguments):
    """Evaluates a jaxpr with the functions that are jitted in it written out."""
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *arguments), strict=True))

    def read(atom):
        return atom.val if isinstance(atom, jax.extend.core.Literal) else values[atom]

    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        if equation.primitive.name in ("jit", "pjit"):
            inner = equation.params["jaxpr"]
            outputs = _inlined(inner.jaxpr, inner.consts, inputs)
        else:
            bound = equation.primitive.get_bind_params(equation.params)
            functions, parameters = bound if isinstance(bound, tuple) else ((), bound)  # by the version of jax
            with equation.ctx.manager:
                outputs = equation.primitive.bind(*functions, *inputs, **parameters)
            outputs = outputs if equation.primitive.multiple_results else [outputs]
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]
