"""The loop that drives attacks over many images: the same result in any batches and on any devices, every pass counted."""

import dataclasses
import functools
import importlib

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import Partial

from jaxrd import ThreatModel, attacks
from jaxrd.attacks.apgd import Apgd
from jaxrd.attacks.network import Network, as_network
from jaxrd.attacks.search import Passes, Run, attack, batch_sizes, run_search, score, targets_of
from jaxrd.threat import example_keys
from jaxrd.training.parallel import data_mesh
from tests.support import assert_input_error

COUNT, SHAPE, CLASSES, STEPS = 21, (4, 4, 2), 5, 4
SIZE = int(np.prod(SHAPE))
KEY = jax.random.key(0)
GENERATOR = np.random.default_rng(0)
WEIGHTS = [0.6 * GENERATOR.normal(size=(SIZE, 12)).astype(np.float32), GENERATOR.normal(size=(12, CLASSES)).astype(np.float32)]
IMAGES = GENERATOR.uniform(size=(COUNT, *SHAPE)).astype(np.float32)
THREAT = ThreatModel("linf", 0.03)
EVERY = np.arange(COUNT)


def mlp(weights, images):
    return jnp.tanh((images.reshape(len(images), -1) - 0.5) @ weights[0]) @ weights[1]


LOGITS = np.asarray(mlp(WEIGHTS, IMAGES))
LABELS = np.argmax(LOGITS, axis=1).astype(np.int32)
LABELS[4] = (LABELS[4] + 1) % CLASSES
NETWORK = Network(Partial(mlp, WEIGHTS))
POINTS = Run(None).points({"images": IMAGES, "labels": LABELS})
KEYS = example_keys(KEY, COUNT)


def searched(search=Apgd("ce", STEPS), network=NETWORK, points=POINTS, keys=KEYS, indices=EVERY, sizes=(8,), mesh=None):
    """The results of all batches together, in the order of the indices."""
    if mesh is not None:
        network = jax.device_put(network, NamedSharding(mesh, PartitionSpec()))
    found = list(run_search(search, network, points, keys, indices, THREAT, sizes=sizes, mesh=mesh))
    np.testing.assert_array_equal(np.concatenate([part.indices for part in found]), indices)
    return {name: np.concatenate([getattr(part, name) for part in found]) for name in ("images", "fooled", "loss")} | {
        name: sum(getattr(part, name) for part in found) for name in ("zero_gradients", "forwards", "backwards")}


@functools.cache
def reference():
    found = searched(sizes=(COUNT,))
    assert 3 < found["fooled"].sum() < COUNT - 3
    return found


def assert_same(found, expected, rows=slice(None)):
    np.testing.assert_array_equal(found["fooled"], expected["fooled"][rows])
    np.testing.assert_allclose(found["images"], expected["images"][rows], atol=1e-5)
    np.testing.assert_allclose(found["loss"], expected["loss"][rows], atol=1e-5, rtol=1e-5)


# Batches and devices.


@pytest.mark.parametrize("devices, sizes", [(None, (8,)), (None, (40,)), (None, (16, 8)), (1, (8,)), (2, (8,)), (4, (8, 4))])
def test_batches_padding_and_devices_do_not_change_the_result(devices, sizes):
    mesh = devices and data_mesh(jax.devices()[:devices])
    found = searched(sizes=sizes, mesh=mesh)
    assert_same(found, reference())
    assert (found["forwards"], found["backwards"]) == (reference()["forwards"], reference()["backwards"])


def test_a_part_of_the_points_with_its_own_keys_gives_their_rows():
    rows = np.array([17, 4, 9, 0, 20])
    assert_same(searched(indices=rows), reference(), rows)  # the same arrays, fewer indices
    part = {name: value[rows] for name, value in POINTS.items()}
    assert_same(searched(points=part, keys=KEYS[rows], indices=np.arange(5)), reference(), rows)  # other arrays
    assert not np.allclose(searched(points=part, keys=KEYS[:5], indices=np.arange(5))["images"], reference()["images"][rows],
                           atol=1e-3)


def test_no_points_are_no_batches():
    assert list(run_search(Apgd("ce", STEPS), NETWORK, POINTS, KEYS, EVERY[:0], THREAT, sizes=(8,))) == []


@hypothesis.given(batch_size=strategies.integers(1, 5000), devices=strategies.integers(1, 16))
def test_batch_sizes_are_few_and_waste_little(batch_size, devices):
    sizes = batch_sizes(batch_size, devices)
    assert 1 <= len(sizes) <= 6 and sizes == sorted(set(sizes), reverse=True)
    assert all(size > 0 and size % devices == 0 for size in sizes)
    assert batch_size <= sizes[0] < batch_size + devices
    assert all(large <= 2 * small for large, small in zip(sizes, sizes[1:]))
    assert len(sizes) == 6 or sizes[-1] <= max(2 * 8, devices, batch_size if batch_size < 16 else 0) + devices


# The whole attack.


def whole(runs, points=None, rows=EVERY[:12], jit=False, threat=THREAT):  # 12 leave no choice of the batch size
    def call(images, labels, keys, points):
        return attack(runs, keys, Partial(mlp, WEIGHTS), images, labels, threat, **points)

    call = jax.jit(call) if jit else call
    points = {name: value[rows] for name, value in (points or {}).items()}
    return attack_dict(call(jnp.asarray(IMAGES[rows]), jnp.asarray(LABELS[rows]), KEYS[rows], points))


def attack_dict(result):
    return {name: np.asarray(value) for name, value in result._asdict().items()}


TARGETED = Apgd("dlr-targeted", STEPS)
RUNS = {
    "one": [Run(Apgd("ce", STEPS))],
    "two restarts": [Run(Apgd("ce", STEPS), 0, 0), Run(Apgd("ce", STEPS), 0, 1)],
    "one target": [Run(TARGETED, 3)],
}


@pytest.mark.parametrize("runs", ["two restarts", "one target"])
def test_under_jit_the_result_is_the_same(runs):
    assert_same(whole(RUNS[runs], jit=True), whole(RUNS[runs]))


@pytest.mark.parametrize("name", ["start", "target"])
def test_under_jit_given_starts_and_targets_are_used_too(name):
    points = {"start": np.clip(IMAGES + 0.03 * np.sign(GENERATOR.normal(size=IMAGES.shape)), 0, 1).astype(np.float32)}
    runs = RUNS["one"]
    if name == "target":
        runs, points = [Run(TARGETED)], {"target": np.argsort(LOGITS, axis=1)[:, -2].astype(np.int32)}
    given = whole(runs, points=points)
    assert_same(whole(runs, points=points, jit=True), given)
    assert not np.allclose(given["loss"], whole(RUNS["one target" if name == "target" else "one"])["loss"], atol=1e-3)


def test_a_part_of_the_images_is_attacked_as_in_the_whole():
    rows = np.array([3, 9, 11, 4, 7])
    assert_same(whole(RUNS["two restarts"], rows=rows), whole(RUNS["two restarts"]), rows)


def test_a_run_sees_the_points_that_those_before_left_and_the_largest_loss_is_kept():
    runs = [Run(Apgd("ce", 1), 0, restart) for restart in (4, 1)]
    first, second, both = (whole(part, threat=ThreatModel("l2", 0.17)) for part in (runs[:1], runs[1:], runs))
    assert (second["fooled"] & ~first["fooled"]).any()
    np.testing.assert_array_equal(both["fooled"], first["fooled"] | second["fooled"])
    chosen = np.where(first["fooled"][:, None, None, None], first["images"], second["images"])
    np.testing.assert_allclose(both["images"], chosen, atol=1e-6)
    np.testing.assert_allclose(
        both["loss"], np.where(first["fooled"], first["loss"], np.maximum(first["loss"], second["loss"])), rtol=1e-5)
    assert (first["images"] != second["images"]).any(axis=(1, 2, 3))[first["fooled"] & second["fooled"]].any()


def test_the_ranks_of_targets_are_those_of_the_clean_logits():
    for rank in range(1, CLASSES + 1):
        batch = Run(TARGETED, rank).points({"images": IMAGES, "labels": LABELS}) | {"key": KEYS}
        np.testing.assert_array_equal(targets_of(NETWORK, batch), np.argsort(-LOGITS, axis=1)[:, rank - 1])
    given = (LABELS + 1) % CLASSES
    np.testing.assert_array_equal(targets_of(NETWORK, batch | {"target": given}), given)


def test_among_equal_logits_the_first_has_the_first_rank():
    """As argmax has it: else an image that is right could be aimed at its own class."""
    logits = np.array([[0, 1, 1, 0, 1], [2, 2, 2, 2, 2], [0, 0, 3, 3, 0]], np.float32)
    network = Network(Partial(lambda logits, images: logits, logits))
    ranked = [np.asarray(targets_of(network, {"images": IMAGES[:3], "rank": np.full(3, rank), "key": KEYS[:3]})) for rank in
              range(1, 6)]
    np.testing.assert_array_equal(ranked[0], np.argmax(logits, axis=1))
    np.testing.assert_array_equal(np.sort(np.stack(ranked, 1)), np.broadcast_to(np.arange(5), (3, 5)))


# What is computed.


class Counter:
    """A network that counts the images forwarded and differentiated, as they are executed (not traced)."""

    def __init__(self):
        self.forwards = self.backwards = 0

    def __call__(self, images):
        self.forwards += len(images)

        @jax.custom_vjp
        def tap(logits):
            return logits

        def backward(_, cotangent):
            self.backwards += len(images)
            return (cotangent,)

        tap.defvjp(lambda logits: (logits, None), backward)
        return tap(mlp(WEIGHTS, images))


@pytest.mark.parametrize("search, forwards, backwards", [
    (Apgd("ce", 3), 4, 4), (Apgd("dlr-targeted", 2), 4, 3), (Apgd("ce", 1, eot=3), 6, 6),
    (Apgd("dlr-targeted", 1, eot=2), 5, 4)])
def test_the_passes_that_are_told_are_those_executed(search, forwards, backwards):
    points = Run(search, 2).points({"images": IMAGES, "labels": LABELS})
    counter = Counter()
    with jax.disable_jit():
        found, = run_search(search, Network(Partial(counter)), points, KEYS, EVERY[:6], THREAT, sizes=(8,))
    assert (counter.forwards, counter.backwards) == (forwards * 8, backwards * 8)
    assert (found.forwards, found.backwards) == (forwards * 6, backwards * 6)  # without padding


def test_vanishing_gradients_are_counted_without_padding():
    network = Network(Partial(lambda weights, images: jnp.where(
        images[:, :1, 0, 0] > 0.5, 1.0, mlp(weights, images)), WEIGHTS))
    flat = IMAGES[:, 0, 0, 0] > 0.55  # beyond the start's reach of 0.5
    steep = IMAGES[:, 0, 0, 0] < 0.45
    rows = np.flatnonzero(flat | steep)
    assert 3 < flat.sum() < len(rows) - 3 and len(rows) % 8
    assert searched(network=network, indices=rows)["zero_gradients"] == flat.sum()
    assert reference()["zero_gradients"] == 0


# A search that stops early: each point asks for as many steps as its label says.


@dataclasses.dataclass(frozen=True)
class Patience:
    """Counts the steps that each point gets, and adds to its pixels what the rows say, up to the label's number of steps."""

    steps: int = 8
    differentiates = True  # one step per compiled call on CPU
    stops_early = True

    @property
    def cost(self):
        return {"start": Passes(2, 1), "step": Passes(3, 2), "finish": Passes(5, 0)}

    def value(self, logits, labels):
        return logits[:, 0]

    def rows(self):
        return {"add": 2.0 ** np.arange(self.steps, dtype=np.float32)}

    def start(self, network, batch, threat):
        return {"images": batch["images"], "labels": batch["labels"], "total": 0.0 * batch["images"][:, 0, 0, 0],
                "finite": jnp.ones(batch["labels"].shape, bool), "active": batch["labels"] > 0, "done": 0 * batch["labels"]}

    def step(self, network, state, row, threat):
        active = state["active"]
        done = state["done"] + active
        total = state["total"] + active * row["add"]
        return state | {"done": done, "total": total, "active": active & (done < state["labels"])}

    def finish(self, network, state, threat):
        return attacks.AttackResult(state["images"], state["done"] % 2 == 1, state["total"])


@pytest.mark.parametrize("needed", [
    [0] * 20, [8] * 20, list(range(20)), [0, 8, 1, 7, 2, 6, 3, 5, 4] * 2, [1, 8, 1, 1, 1, 1, 1, 1], [3]])
@pytest.mark.parametrize("devices, sizes", [(None, (20, 10, 5, 2)), (None, (7, 3)), (2, (8, 4, 2)), (4, (4,))])
def test_points_that_need_no_more_steps_leave_the_batch(needed, devices, sizes):
    labels = np.array(needed, np.int32)
    n = len(labels)
    points = Run(None).points({"images": IMAGES[:n], "labels": labels})
    order = np.random.default_rng(1).permutation(n)
    found = searched(Patience(), points=points, keys=KEYS[:n], indices=order, sizes=sizes,
                     mesh=devices and data_mesh(jax.devices()[:devices]))
    steps = np.minimum(labels, 8)[order]
    np.testing.assert_array_equal(found["images"], IMAGES[:n][order])
    np.testing.assert_array_equal(found["loss"], 2.0**steps - 1)  # the sum of the rows 0 .. steps - 1
    np.testing.assert_array_equal(found["fooled"], steps % 2 == 1)
    # Nobody leaves before a smaller batch holds the rest; nobody is counted after that.
    assert 2 * n + 3 * steps.sum() + 5 * n <= found["forwards"] <= 2 * n + 3 * 8 * n + 5 * n
    if set(needed) == {0} or set(needed) == {8}:
        assert found["forwards"] == 2 * n + 3 * steps.sum() + 5 * n and found["backwards"] == n + 2 * steps.sum()


def test_points_that_left_are_not_counted():
    labels = np.array([8, 1, 1, 1, 1, 1, 1, 1], np.int32)
    points = Run(None).points({"images": IMAGES[:8], "labels": labels})
    found = searched(Patience(), points=points, keys=KEYS[:8], indices=np.arange(8), sizes=(8, 4, 1))
    assert found["forwards"] == 2 * 8 + 3 * (8 + 7) + 5 * 8  # all in the first step, one in the others


# Logits that are not finite.


def test_logits_that_turn_nan_on_the_way_are_told():
    """Where the images are 0.5 all over, and NaN comes where their mean has been moved up to a threshold."""
    images, labels = np.full((8, *SHAPE), 0.5, np.float32), np.zeros(8, np.int32)

    def logits_fn(threshold, images):
        mean = jnp.mean(images, axis=(1, 2, 3))
        return jnp.where(mean[:, None] > threshold, jnp.nan, jnp.stack([1 - mean, mean - 0.2], axis=1))

    def attacked(threshold):
        return attacks.apgd(KEY, Partial(logits_fn, threshold), images, labels, threat=THREAT, steps=2)

    assert not attacked(0.6).fooled.any()
    for threshold in (0.52, 0.4):
        assert_input_error(lambda: attacked(threshold), "8 of the 8", "finite")
    points = Run(None).points({"images": images, "labels": labels})
    network = Network(Partial(logits_fn, 0.52))
    assert_input_error(lambda: searched(network=network, points=points, keys=KEYS[:8], indices=EVERY[:5]), "5 of the 5")
    jax.jit(attacked)(0.52)  # nobody can raise here


def test_scores_are_those_of_the_logits_in_any_batch():
    expected = np.argmax(LOGITS, axis=1) == LABELS
    for size in (4, COUNT):
        np.testing.assert_array_equal(score(NETWORK, POINTS, KEYS, size=size), expected)
    mesh = data_mesh(jax.devices()[:2])
    network = jax.device_put(NETWORK, NamedSharding(mesh, PartitionSpec()))
    np.testing.assert_array_equal(score(network, POINTS, KEYS, size=8, mesh=mesh), expected)
    bad = POINTS | {"images": np.where(EVERY[:, None, None, None] == 20, np.nan, IMAGES).astype(np.float32)}
    assert_input_error(lambda: score(NETWORK, bad, KEYS, size=8), "finite")


# Compilations.


COMPILED = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, _, **__: COMPILED.append(event) if event == "/jax/core/compile/backend_compile_duration" else None)


@pytest.mark.parametrize("loss", ["ce", "dlr-targeted"])
def test_another_model_radius_key_restart_or_target_compiles_nothing(loss):
    """Eight images, which leave no choice of the batch size."""
    arguments = dict(images=IMAGES[:8], labels=LABELS[:8], steps=STEPS, loss=loss)

    def run(seed=0, scale=1.0, epsilon=0.03, **more):
        weights = [scale * weight for weight in WEIGHTS]
        threat = ThreatModel("linf", epsilon)
        return attacks.apgd(jax.random.key(seed), Partial(mlp, weights), threat=threat, **arguments | more)

    COMPILED.clear()
    run()
    assert 0 < len(COMPILED) < 25
    run(seed=1)
    COMPILED.clear()
    results = [run(seed=1), run(scale=-0.5), run(epsilon=0.05), run(restarts=3), run(labels=LABELS[8:16], images=IMAGES[8:16])]
    if loss == "dlr-targeted":
        results.append(run(targets=1))
    assert COMPILED == []
    assert len({tuple(np.asarray(result.loss).tolist()) for result in results}) == len(results)


def test_a_network_is_traced_once_for_all_models_of_its_kind():
    traces = []

    def traced(weights, images):
        traces.append(images.shape)
        return mlp(weights, images)

    def run(scale):
        network = Partial(traced, [scale * weight for weight in WEIGHTS])
        attacks.apgd(KEY, network, IMAGES[:8], LABELS[:8], threat=THREAT, steps=STEPS)

    run(1.0)
    first = len([shape for shape in traces if shape[0] == 8])
    assert 1 <= first <= 4
    run(2.0)
    assert len([shape for shape in traces if shape[0] == 8]) == first


def test_a_closure_is_compiled_once_for_all_its_attacks():
    network = as_network(function := lambda images: mlp(WEIGHTS, images), IMAGES)
    for epsilon in (0.02, 0.03):
        COMPILED.clear()
        attacks.apgd(KEY, function, IMAGES[:8], LABELS[:8], threat=ThreatModel("linf", epsilon), steps=STEPS)
    assert COMPILED == [] and network.leaves


def test_weights_and_key_may_lie_on_different_devices():
    first, second = jax.devices()[:2]
    weights = jax.device_put(jnp.eye(3), second)
    images = np.array([[0.6, 0.5, 0.1], [0.2, 0.9, 0.1]], np.float32).reshape(2, 1, 3, 1)
    arguments = images, np.array([0, 1]), ThreatModel("linf", 0.1)
    key = jax.device_put(jax.random.key(0), first)
    result = attacks.apgd(key, lambda x: x.reshape(len(x), -1) @ weights, *arguments[:2], threat=arguments[2], steps=2)
    assert result.fooled.tolist() == [True, False]
    found = attacks.autoattack(
        key, lambda x: x.reshape(len(x), -1) @ weights, *arguments[:2], threat=arguments[2], version=["apgd-ce"], say=None)
    assert found.robust.tolist() == [False, True]


def test_double_precision_elsewhere_changes_no_dtype_here():
    """As for users who switch it on for their own code: a scan of mixed dtypes would not compile."""
    images = np.random.default_rng(0).uniform(size=(4, 2, 3, 1)).astype(np.float32)
    weights = np.random.default_rng(1).normal(size=(6, 4)).astype(np.float32)
    with jax.enable_x64(True):
        logits_fn = Partial(lambda weights, x: x.reshape(len(x), -1) @ weights, jnp.asarray(weights))
        labels = jnp.argmax(logits_fn(images), axis=-1)
        for norm in ("linf", "l2"):
            arguments, threat = (logits_fn, images, labels), ThreatModel(norm, 0.05)
            for run in (
                    lambda key: attacks.apgd(key, *arguments, threat=threat, loss="dlr-targeted", steps=2),
                    lambda key: attacks.fab(key, *arguments, threat=threat, steps=2, restarts=2, targets=1),
                    lambda key: attacks.fab(key, *arguments, threat=threat, steps=2),
                    lambda key: attacks.square(key, *arguments, threat=threat, queries=3),
                    lambda key: attacks.pgd_attack(key, *arguments, threat=threat, steps=2)):
                shapes = jax.eval_shape(run, jax.random.key(0))
                assert shapes.images.dtype == shapes.loss.dtype == jnp.float32


def test_several_devices_compile_a_step_once():
    """Where the state is laid out over them as a step leaves it, before the first step."""
    mesh, threat = data_mesh(jax.devices()[:2]), ThreatModel("linf", 0.1)
    network = jax.device_put(as_network(Partial(lambda w, x: x.reshape(len(x), -1) @ w, jnp.eye(3)), np.zeros((1, 1, 3, 1))),
                             NamedSharding(mesh, PartitionSpec()))
    points = {"images": np.full((4, 1, 3, 1), 0.5, np.float32), "labels": np.zeros(4, np.int32)}

    def compiled_for(steps):
        run, before = Run(Apgd("ce", steps)), len(COMPILED)
        list(run_search(run.search, network, run.points(points), example_keys(jax.random.key(0), 4), np.arange(4), threat,
                        sizes=[4], mesh=mesh))
        return len(COMPILED) - before

    compiled_for(5)  # what all searches share
    assert compiled_for(1) == compiled_for(4) == 3  # start, step, finish


@pytest.mark.parametrize("unroll", [True, 1])
def test_more_classes_than_gradients_at_once_come_to_the_same(monkeypatch, unroll):
    module = importlib.import_module("jaxrd.attacks.fab")
    images = np.random.default_rng(0).uniform(0.3, 0.7, size=(4, 2, 3, 1)).astype(np.float32)
    weights = np.random.default_rng(1).normal(size=(6, 5)).astype(np.float32)
    logits_fn = Partial(lambda weights, x: jnp.tanh(x.reshape(len(x), -1) @ weights), weights)
    labels = np.asarray(jnp.argmax(logits_fn(images), axis=-1))

    def found():
        return attacks.fab(jax.random.key(0), logits_fn, images, labels, threat=ThreatModel("linf", 0.3), steps=12)

    expected = found()
    monkeypatch.setattr(module, "_CLASSES_AT_ONCE", 2)
    monkeypatch.setattr(module, "loop_unroll", lambda: unroll)
    jax.clear_caches()
    np.testing.assert_allclose(found().loss, expected.loss, rtol=1e-5)
