"""Images a second of what surrounds a train step: the input that reaches it, and the attacks that evaluate what it trained."""

import dataclasses
import time

import jax
import numpy as np

from jaxrd import models
from jaxrd.attacks.autoattack import cascade
from jaxrd.attacks.network import as_network
from jaxrd.attacks.search import run_search
from jaxrd.config import Config
from jaxrd.data.augment import augment, to_float
from jaxrd.data.source import Source
from jaxrd.performance.timing import Spread
from jaxrd.threat import ThreatModel, example_keys
from jaxrd.training import parallel
from jaxrd.training.feeding import Feeder

_EVALUATED = 250  # images, a batch of AutoAttack's
_QUERIES = 500  # of Square's, which all cost the same


@dataclasses.dataclass(frozen=True)
class InputRates:
    """What a batch takes on its way to the step.

    Attributes:
      resident: whether the images lie on the devices.
      batches: of one repetition.
      seconds: of a batch, by what is done to it.
    """

    resident: bool
    batches: int
    seconds: dict[str, Spread]


def input_rates(config: Config, source: Source, mesh: jax.sharding.Mesh, repeats: int) -> InputRates:
    """Returns how long batches take to be gathered, brought to the devices and augmented, with no step behind.

    Args:
      config: batch size and augmentation are its own; nothing is mixed.
      source: the images.
      mesh: the devices.
      repeats: of an epoch, or 50,000 images.
    """
    batch_size = config.training.batch_size
    parallel.check_batch_size("config.training.batch_size", batch_size, mesh)
    augmentation = dataclasses.replace(config.build_augmentation(), mixing="none")
    key, batches = jax.random.key(0), max(50_000 // batch_size, 1)

    @jax.jit
    def augmented(key, step, images):
        return augment(augmentation, example_keys(jax.random.fold_in(key, step), batch_size), images)

    def feeder():
        return Feeder(source, mesh, seed=0, batch_size=batch_size, resident=config.data.resident)

    def of_a_batch(pipeline) -> Spread:
        results, seconds = [], []
        with feeder() as stream:
            for _ in range(repeats + 1):
                began = time.perf_counter()
                for step in range(batches):
                    results = [*results[-2:], pipeline(step, stream)]
                    jax.block_until_ready(results[0])
                jax.block_until_ready(results)
                seconds.append((time.perf_counter() - began) / batches)
        return Spread.of(seconds[1:])

    with feeder() as stream:
        one, resident = next(stream)["images"], stream.resident
    return InputRates(resident, batches, {
        "gathered and brought there": of_a_batch(lambda step, stream: next(stream)["images"]),
        "augmented": of_a_batch(lambda step, stream: augmented(key, step, one)),
        "both, as in training": of_a_batch(lambda step, stream: augmented(key, step, next(stream)["images"]))})


@dataclasses.dataclass(frozen=True)
class AttackRate:
    """What an attack of AutoAttack takes for images that stay robust to the end.

    Attributes:
      runs: how often it starts anew.
      forwards, backwards: passes of the network for each image.
      seconds_per_image: the median.
      cold_seconds, cached_seconds: of compilation, from nothing and from the persistent cache.
    """

    runs: int
    forwards: int
    backwards: int
    seconds_per_image: float
    cold_seconds: float
    cached_seconds: float


@jax.default_matmul_precision("highest")  # as evaluations do
def attack_rates(config: Config, source: Source, names: list[str], repeats: int) -> tuple[int, dict[str, AttackRate]]:
    """Returns how many images a batch had, and by attack what it takes, the attacks timed in turn.

    The student is untrained and the radius next to nothing, so that no point is ever broken: what is timed is the most that an
    image can cost. Square is timed over its first 500 queries.

    Args:
      config: student and norm are its own.
      source: the images.
      names: attacks, such as "apgd-ce".
      repeats: of each.

    Raises:
      InputError: an unknown attack.
    """
    images = np.asarray(to_float(source.images[:_EVALUATED]))
    model = models.create(config.student, classes=source.classes, image_shape=source.image_shape)
    network = as_network(models.logits_fn(model, model.init(jax.random.key(0))), images)
    points = {"images": images, "labels": np.asarray(np.argmax(network(images), axis=1), np.int32)}
    keys, indices, sizes = example_keys(jax.random.key(0), len(images)), np.arange(len(images)), [len(images)]
    threat = ThreatModel(config.threat.norm, 1e-6)
    stages, _ = cascade(names, source.classes)
    factors = {}

    def timed(stage):
        run = stage.runs[0]
        if stage.name == "square":
            run = run._replace(search=dataclasses.replace(run.search, queries=_QUERIES))
        factors[stage.name] = stage.runs[0].search.steps / run.search.steps * len(stage.runs)
        began = time.perf_counter()
        list(run_search(run.search, network, run.points(points), run.keys(keys), indices, threat, sizes=sizes))
        return time.perf_counter() - began

    cold = {stage.name: timed(stage) for stage in stages}
    jax.clear_caches()
    cached = {stage.name: timed(stage) for stage in stages}
    seconds = {stage.name: [] for stage in stages}
    for _ in range(repeats):
        for stage in stages:
            seconds[stage.name].append(timed(stage))
    found = {}
    for stage in stages:
        median, search, runs = Spread.of(seconds[stage.name]).median, stage.runs[0].search, len(stage.runs)
        forwards, backwards = runs * (np.array(search.cost["start"]) + search.steps * np.array(search.cost["step"]))
        found[stage.name] = AttackRate(
            runs, int(forwards), int(backwards), median * factors[stage.name] / len(images), cold[stage.name] - median,
            cached[stage.name] - median)
    return len(images), found
