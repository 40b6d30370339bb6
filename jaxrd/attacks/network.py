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
        if isinstance(logits_fn, Partial):
            function, logits = logits_fn, jax.eval_shape(logits_fn, example, *extra)
        else:
            lifted = _lifted(logits_fn)
            closed = jax.make_jaxpr(logits_fn)(example, *extra)
            function, logits = Partial(lifted, closed.consts), jax.eval_shape(logits_fn, example, *extra)
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"logits_fn cannot be traced on images {list(example.shape)}: {first}") from error
    shape = getattr(logits, "shape", None)
    if shape is None or len(shape) != 2 or shape[0] != 2 or shape[1] < 2:
        given = f"[batch, {', '.join(map(str, shape[1:]))}]" if shape and shape[0] == 2 else shape or type(logits).__name__
        raise InputError(f"logits_fn returns {given} instead of logits [batch, classes >= 2]")
    return Network(function, randomised)


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

    Holds the function weakly: what compiled code remembers must not keep a model's weights in memory.
    """

    def __init__(self, function):
        self._function = weakref.ref(function)
        self.__name__ = getattr(function, "__name__", type(function).__name__)

    def __call__(self, constants, *arguments):
        closed = jax.make_jaxpr(self._function())(*arguments)
        shapes = [[(jnp.shape(c), jnp.result_type(c)) for c in part] for part in (closed.consts, constants)]
        if shapes[0] == shapes[1]:  # else they depend on the batch size, and stay constants
            closed = jax.extend.core.ClosedJaxpr(closed.jaxpr, constants)
        return jax.extend.core.jaxpr_as_fun(closed)(*arguments)[0]


_known: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _lifted(function) -> _Lifted:
    """The same object for the same function, so that what was compiled for it is found again."""
    try:
        return _known.setdefault(function, _Lifted(function))
    except TypeError:  # cannot be hashed or referred to weakly
        raise InputError(f"logits_fn is a {type(function).__name__} that cannot be hashed; wrap it: lambda x: f(x)") from None
