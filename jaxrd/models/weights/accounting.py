"""Which arrays of a file are a model's weights: the right dictionary of a checkpoint, no prefixes, every key accounted for."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxrd.errors import InputError
from jaxrd.models.weights import layouts
from jaxrd.models.weights.unpickling import printable

# Names of dictionaries in checkpoints, the one that is taken first in front: averaged weights are what their authors evaluate,
# and "last" goes before "best", as RobustBench takes them.
_PREFERENCE = (
    r"(.*[._])?(ema|swa|wa|avg|average|averaged)([._].*)?", r"(.*\.)?(model_)?state_dict", "",
    r"(.*\.)?(model|net|network|student)", r"(.*\.)?last", r".*")
_NOT_AVERAGED = r"(.*[._])?(unaveraged|best)([._].*)?"
# Averaging counts of torch.optim.swa_utils; entries that TRADES' class registers and never calls.
_COUNTERS, _DEAD = (layouts.COUNTER, "n_averaged"), r"sub_block1\..*"
_MEANS, _STDS = ("mean", "mu"), ("std", "sigma")
# No file has more; one that claims to must not make the search long.
_MOST_IN_A_LIST, _MOST_NETWORKS, _MOST_CHANNELS = 100, 16, 4


@dataclasses.dataclass(frozen=True)
class Accounts:
    """What became of each array of a file.

    Attributes:
      arrays: {key of the model's layout: leaf of the file}, a leaf having `shape`, `dtype` and perhaps `array()`.
      container: dotted name of the dictionary that they were in; "" where it is the file itself.
      others: names of further dictionaries in the file that hold all weights of the same architecture.
      partial: names of dictionaries that hold half of them or more, such as an average without BatchNorm's statistics.
      prefix: what stood before every key.
      counters: BatchNorm's num_batches_tracked, by key.
      scalars: keys of other single numbers, such as the decay of an average.
      dead: keys of weights that the public class never calls.
      normalization: (mean, std) of the images, where the file has them.
      in_front: those are of a layer in front of the network, not its own.
      unused: every other key.
    """

    arrays: Mapping[str, Any]
    container: str = ""
    others: tuple[str, ...] = ()
    partial: tuple[str, ...] = ()
    prefix: str = ""
    counters: Mapping[str, int] = dataclasses.field(default_factory=dict)
    scalars: tuple[str, ...] = ()
    dead: tuple[str, ...] = ()
    normalization: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    in_front: bool = False
    unused: tuple[str, ...] = ()


def account(source: str, content: Any, keys: list[str], container: str | None = None) -> Accounts:
    """Finds the weights of an architecture in what a file holds.

    Args:
      source: the file, for errors.
      content: nested dictionaries with leaves that have a shape.
      keys: those of the architecture's layout, the weight of its last layer among them.
      container: the dotted name of the dictionary to take, or, where one holds several networks, the prefix of one; None for
        the best by `_PREFERENCE` of those that fit.

    Returns:
      the accounts; `arrays` may lack keys, where no dictionary has them all.

    Raises:
      InputError: no dictionary of that name, or no weights at all.
    """
    found = {name: state for outer, whole in _dictionaries(content) for name, state in _networks(outer, whole, keys)}
    if not found:
        raise InputError(f"{source}: no tensors in it ({_describe(content)}); give a file of weights, such as a state_dict")
    if container is not None:
        if container not in found:
            raise InputError(
                f'{source}: no dictionary "{printable(container)}" with tensors in it; there are: {_listed(found)}')
        return _of(found[container], keys, container)
    accounts = {name: _of(state, keys, name) for name, state in found.items()}
    complete = [name for name in found if len(accounts[name].arrays) == len(keys)]
    if not complete:
        return max(accounts.values(), key=lambda one: len(one.arrays))
    # A deeper network has every key of a shallower one, and others besides.
    exact = [name for name in complete if not accounts[name].unused] or complete
    best = min(exact, key=_rank)
    return dataclasses.replace(
        accounts[best], others=tuple(name for name in complete if name != best),
        partial=tuple(name for name in found if name not in complete and 2 * len(accounts[name].arrays) >= len(keys)))


def contents(content: Any) -> dict[str, tuple[int, ...]]:
    """Returns {key: shape} of the largest dictionary in a file, common prefixes removed: what `layouts.identify` takes."""
    found = dict(_dictionaries(content))
    state = max(found.values(), key=len, default={})
    heads = [key.removesuffix(head) for key in state for head in ("linear.weight", "fc.weight", "logits.weight")
             if key == head or key.endswith(f".{head}")]
    prefix = min(heads, key=len, default="")
    return {key.removeprefix(prefix): tuple(leaf.shape) for key, leaf in state.items() if key.startswith(prefix)}


def _dictionaries(content: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (dotted name, {key: leaf}) of every dictionary that holds tensors itself."""
    if isinstance(content, (list, tuple)):
        content = {str(index): value for index, value in enumerate(content[:_MOST_IN_A_LIST]) if not hasattr(value, "shape")}
    if not isinstance(content, Mapping):
        return
    state = {key: value for key, value in content.items() if isinstance(key, str) and hasattr(value, "shape")}
    if any(len(value.shape) > 0 for value in state.values()):
        yield name, state
    if depth < 3:  # deeper ones are an optimiser's; a hostile file cannot make this long by sharing dictionaries
        for key, value in content.items():
            if isinstance(key, str):
                yield from _dictionaries(value, f"{name}.{key}" if name else key, depth + 1)


def _networks(name: str, state: dict[str, Any], keys: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (name, {key: leaf}) of each network in a dictionary, where it holds several: "student.*" beside "teacher.*"."""
    prefixes = [prefix for prefix, count in _prefixes(state, keys).items() if count == len(keys)]
    if len(prefixes) < 2:
        yield name, state
        return
    for prefix in prefixes[:_MOST_NETWORKS]:
        others = tuple(other for other in prefixes[:_MOST_NETWORKS] if other != prefix and other)
        # What belongs to none of them, such as a normalisation in front, is everybody's.
        own = {key: leaf for key, leaf in state.items()
               if not key.startswith(others) and (key.startswith(prefix) or "" not in prefixes)}
        yield ".".join(filter(None, (name, prefix.rstrip(".")))), own


def _of(state: Mapping[str, Any], keys: list[str], container: str) -> Accounts:
    wanted = set(keys)
    prefixes = _prefixes(state, keys)
    prefix = max(prefixes, key=lambda prefix: (prefixes[prefix], -len(prefix)))
    arrays, counters, scalars, dead, means, stds, unused = {}, {}, [], [], {}, {}, []
    for key, leaf in state.items():
        name = key.removeprefix(prefix)
        last = name.rpartition(".")[2]
        if key.startswith(prefix) and name in wanted:
            arrays[name] = leaf
        elif last in _COUNTERS and math.prod(leaf.shape) == 1 and np.dtype(leaf.dtype).kind in "iu":
            counters[name] = leaf
        elif re.fullmatch(_DEAD, name):
            dead.append(key)
        elif last in (*_MEANS, *_STDS) and math.prod(leaf.shape) <= _MOST_CHANNELS:
            (means if last in _MEANS else stds)[key] = leaf
        elif not leaf.shape:
            scalars.append(key)
        else:
            unused.append(key)
    normalization, in_front = None, False
    if len(means) == len(stds) == 1:
        mean, std = (tuple(float(value) for value in np.ravel(read(next(iter(one.values()))))) for one in (means, stds))
        if len(mean) == len(std):
            normalization = mean, std
            in_front = not next(iter(means)).startswith(prefix)
    if normalization is None:
        unused += [*means, *stds]
    return Accounts(
        arrays={key: arrays[key] for key in keys if key in arrays}, container=container, prefix=prefix,
        counters={key: read(leaf).item() for key, leaf in counters.items()}, scalars=tuple(scalars),
        dead=tuple(dead), normalization=normalization, in_front=in_front, unused=tuple(unused))


def read(leaf: Any) -> np.ndarray:
    """Returns the values of a leaf."""
    return np.asarray(leaf.array() if hasattr(leaf, "array") else leaf)


def _prefixes(state: Mapping[str, Any], keys: list[str]) -> Mapping[str, int]:
    """Returns {what may stand before the keys of a layout ("", "module.", "module.1.", ...): how many keys are there then}."""
    candidates = collections.Counter({"": 0})
    for anchor in (keys[0], keys[-2], keys[-1]):  # the stem and the last layer
        for key in state:
            if key == anchor or key.endswith(f".{anchor}"):
                candidates[key.removesuffix(anchor)] = 0
    for prefix in candidates:
        candidates[prefix] = sum(f"{prefix}{key}" in state for key in keys)
    return candidates


def _rank(name: str) -> tuple[int, int, str]:
    name = name.lower()
    if re.fullmatch(_NOT_AVERAGED, name):
        return len(_PREFERENCE), len(name), name
    return next(rank for rank, pattern in enumerate(_PREFERENCE) if re.fullmatch(pattern, name)), len(name), name


def _listed(names) -> str:
    return ", ".join(f'"{printable(name)}"' if name else 'the file itself (--entry="")' for name in list(names)[:8])


def some(keys: Sequence[str], most: int = 3) -> str:
    """Returns the first keys of a file, fit for one line, and how many more there are."""
    shown = ", ".join(printable(key) for key in keys[:most])
    return shown + (f" and {len(keys) - most} more" if len(keys) > most else "")


def _describe(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    return f"a dictionary of {some([str(key) for key in content], 6)}" if content else "an empty dictionary"
