"""Several BatchNorms for one network: sets of scale, bias and running statistics that share every other weight.

One set for each kind of input keeps the statistics of one kind out of the normalisation of another: Xie et al. 2020,
"Adversarial Examples Improve Image Recognition" (AdvProp). The functions read trees, not layers, so that any architecture
can have sets: its BatchNorm layers are the modules that own an entry in "batch_stats".

Set 0 lies where a model with one set keeps it. Set k lies under the key "batch_norm_k" of "params" (scale and bias) and of
"batch_stats" (mean and var), each by the names that its modules have in set 0.
"""

from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import jax.numpy as jnp

Variables = dict


def add_sets(variables: Variables, sets: int) -> Variables:
    """Returns the variables of a model with one set, and sets 1 to `sets` - 1 as copies of its set 0.

    Args:
      variables: {"params": ..., "batch_stats": ...}.
      sets: at least 1, with set 0.
    """
    params, batch_stats = variables["params"], variables["batch_stats"]
    modules = {path[:-1] for path in flatten_dict(batch_stats)}
    own = unflatten_dict({path: leaf for path, leaf in flatten_dict(params).items() if path[:-1] in modules})
    # Copies, because a train step donates its state, and no buffer can be donated twice.
    return {
        "params": params | {_key(index): jax.tree.map(jnp.copy, own) for index in range(1, sets)},
        "batch_stats": batch_stats | {_key(index): jax.tree.map(jnp.copy, batch_stats) for index in range(1, sets)},
    }


def select_set(variables: Variables, index: int, sets: int) -> Variables:
    """Returns the variables of a model with one set, whose BatchNorms are those of set `index` of `sets`."""
    params, batch_stats = (_without_sets(variables[kind], sets) for kind in ("params", "batch_stats"))
    if index > 0:
        own = flatten_dict(variables["params"][_key(index)])
        params = unflatten_dict(flatten_dict(params) | own)
        batch_stats = variables["batch_stats"][_key(index)]
    return {"params": params, "batch_stats": batch_stats}


def replace_statistics(batch_stats: Variables, index: int, moved: Variables) -> Variables:
    """Returns all statistics, those of set `index` replaced by `moved`: what a model with one set would have returned."""
    return {**batch_stats, **(moved if index == 0 else {_key(index): moved})}


def _key(index: int) -> str:
    return f"batch_norm_{index}"


def _without_sets(tree: Variables, sets: int) -> Variables:
    extra = {_key(index) for index in range(1, sets)}
    return {name: value for name, value in tree.items() if name not in extra}
