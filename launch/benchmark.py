"""Times a config's train step, part by part: `python -m launch.benchmark --config=configs/digits.py:ard+igdm`.

Medians over repetitions of each compiled part, on this machine, with the config's own data, models and batch size; the parts
are compiled alone, so they need not sum to the step, which XLA fuses as one program. Compilation is timed twice: from
nothing, and from a persistent cache that the first one filled. An untrained teacher takes the place of a missing one, given
its architecture: --teacher_model=resnet6_w32.

    python -m launch.benchmark --config=configs/digits.py:ard+igdm --methods=pgd_at,ard,adaad,path      steps side by side
    python -m launch.benchmark --config=configs/digits.py:ard --attacks=apgd-ce,apgd-t,fab-t,square     AutoAttack, images/s
    python -m launch.benchmark --config=configs/cifar10.py:rslad --input=32x32x3                        input alone, images/s
    python -m launch.benchmark --config=configs/cifar10.py:rslad+igdm --scaling=8,64,1024               on paper: nothing is run
    python -m launch.benchmark --config=configs/digits.py:rslad+igdm --collectives=1,4,8 --cpu_devices=8    of the compiled step
"""

import atexit
import contextlib
import dataclasses
import os
import shutil
import statistics
import tempfile
import time

from absl import flags

from launch import command, start

_REPEATS = flags.DEFINE_integer(
    "repeats", None, "Timed calls of each part, 30 by default (5 with --attacks, 7 with --input); the median is printed.",
    lower_bound=1)
_TEACHER_MODEL = flags.DEFINE_string(
    "teacher_model", None, "Architecture of an untrained teacher to time instead of config.teacher.")
_METHODS = flags.DEFINE_list(
    "methods", None, "Time whole steps of these methods, side by side, instead of the parts of one.")
_ATTACKS = flags.DEFINE_list(
    "attacks", None, "Time these attacks of AutoAttack on the student: apgd-ce, apgd-dlr, apgd-t, fab, fab-t, square.")
_INPUT = flags.DEFINE_string(
    "input", None, 'Time the input alone: "data" for the images of the config, or 50,000 random ones of a shape, such as '
    "32x32x3; batch size and augmentation are the config's.")
_SCALING = flags.DEFINE_list(
    "scaling", None, "How so many devices would do, on paper, from the operations and bytes of the step; with --device_flops, "
    "--link_bytes, --link_latency and --batch_per_device.")
_DEVICE_FLOPS = flags.DEFINE_float(
    "device_flops", 2e14, "Operations a second that a device reaches, with --scaling.", lower_bound=1)
_LINK_BYTES = flags.DEFINE_float("link_bytes", 2.5e10, "Bytes a second over the slowest link, with --scaling.", lower_bound=1)
_LINK_LATENCY = flags.DEFINE_float("link_latency", 1e-5, "Seconds for each hop, with --scaling.", lower_bound=0)
_BATCH_PER_DEVICE = flags.DEFINE_integer("batch_per_device", 128, "Images for each device, with --scaling.", lower_bound=1)
_COLLECTIVES = flags.DEFINE_list(
    "collectives", None, "The collectives of the compiled step on so many devices of this process.")
start.define_flags()


def main() -> None:
    config = command.config()
    start.initialize()
    from jaxrd.training import parallel, processes
    parallel.prepare_process()  # as training does
    with contextlib.nullcontext() if processes.is_main() else contextlib.redirect_stdout(None):
        if _METHODS.value:
            compare(config, [name.strip() for name in _METHODS.value])
        elif _ATTACKS.value:
            attacks_on(config, [name.strip() for name in _ATTACKS.value])
        elif _SCALING.value or _COLLECTIVES.value:
            scaling_of(config)
        elif _INPUT.value:
            input_of(config)
        else:
            parts_of(config)


def compare(config, names: list[str]) -> None:
    """Prints the step time of several methods on one machine, timed in turn, so that what disturbs one disturbs all."""
    import jax

    from jaxrd.config import Config
    from jaxrd.training import loop, parallel, step as steps

    mesh, running = parallel.data_mesh(), {}
    for name in names:
        # Through `from_dict`, which checks them.
        own = Config.from_dict(config.to_dict() | {"method": {**config.to_dict()["method"], "name": name, "igdm": None}})
        recipe, teacher_variables, state, batch, _ = _prepare(own, mesh)
        began = time.perf_counter()
        train_step = steps.make_train_step(recipe, mesh).lower(state, teacher_variables, batch).compile()
        running[name] = [train_step, state, teacher_variables, batch, time.perf_counter() - began, []]
    for turn in range(_repeats() + 1):
        for entry in running.values():
            train_step, state, teacher_variables, batch, _, seconds = entry
            began = time.perf_counter()
            entry[1], metrics = train_step(state, teacher_variables, batch)
            jax.block_until_ready((entry[1], metrics))
            if turn:
                seconds.append(time.perf_counter() - began)
    print(f"{config.student}, batch {config.training.batch_size}, {config.attack.steps} attack steps, "
          f"{mesh.size} {jax.default_backend()} device(s), {os.cpu_count()} cores; medians of {_repeats()}, in turn")
    first = statistics.median(running[names[0]][-1])
    print(f"  {'method':<20}{'ms per step':>12}{'of ' + names[0]:>14}{'memory':>12}{'compilation':>14}")
    for name, (train_step, *_, compilation, seconds) in running.items():
        median, memory = statistics.median(seconds), loop.step_memory(train_step)
        planned = f"{memory['total'] / 2**20:.1f} MiB" if memory else "-"
        print(f"  {name:<20}{1e3 * median:>12.2f}{median / first:>13.2f}x{planned:>12}{compilation:>12.1f} s")


def attacks_on(config, names: list[str]) -> None:
    """Prints how many images of each attack of AutoAttack a second sees to the end, for images that stay robust.

    The student is untrained and the radius next to nothing, so that no point is ever broken: what is timed is the most that an
    image can cost. Square is timed over its first 500 queries.
    """
    import jax
    import numpy as np

    _use_fresh_cache()
    from jaxrd import models
    from jaxrd.attacks.autoattack import cascade
    from jaxrd.attacks.network import as_network
    from jaxrd.attacks.search import run_search
    from jaxrd.data.augment import to_float
    from jaxrd.threat import ThreatModel, example_keys
    from jaxrd.training import loop

    dataset, _ = loop.open_own_data(config)
    source = dataset.test
    images = np.asarray(to_float(source.images[:250]))
    model = models.create(config.student, classes=source.classes, image_shape=source.image_shape)
    network = as_network(models.logits_fn(model, model.init(jax.random.key(0))), images)
    points = {"images": images, "labels": np.asarray(np.argmax(network(images), axis=1), np.int32)}
    keys, indices, sizes = example_keys(jax.random.key(0), len(images)), np.arange(len(images)), [len(images)]
    threat = ThreatModel(config.threat.norm, 1e-6)
    stages, _ = cascade(names, source.classes)

    def timed(stage):
        run = stage.runs[0]
        if stage.name == "square":
            run = run._replace(search=dataclasses.replace(run.search, queries=500))
        factors[stage.name] = stage.runs[0].search.steps / run.search.steps * len(stage.runs)
        began = time.perf_counter()
        list(run_search(run.search, network, run.points(points), run.keys(keys), indices, threat, sizes=sizes))
        return time.perf_counter() - began

    factors = {}
    colds = {stage.name: timed(stage) for stage in stages}
    jax.clear_caches()
    warms = {stage.name: timed(stage) for stage in stages}
    seconds = {stage.name: [] for stage in stages}
    for _ in range(_repeats(5)):
        for stage in stages:
            seconds[stage.name].append(timed(stage))
    print(f"{config.student}, {len(images)} images a batch, {threat.norm}, {jax.default_backend()}, {os.cpu_count()} cores; "
          f"medians of {_repeats(5)}, in turn")
    print(f"  {'attack':<12}{'runs':>5}{'forwards':>10}{'backwards':>10}{'ms per image':>14}{'images/s':>10}"
          f"{'compilation':>13}{'cached':>8}")
    total = 0.0
    for stage in stages:
        median, search = statistics.median(seconds[stage.name]), stage.runs[0].search
        each = median * factors[stage.name] / len(images)
        total += each
        forwards, backwards = len(stage.runs) * np.array(search.cost["start"]) + len(stage.runs) * search.steps * np.array(
            search.cost["step"])
        print(f"  {stage.name:<12}{len(stage.runs):>5}{forwards:>10,}{backwards:>10,}{1e3 * each:>14.2f}{1 / each:>10,.1f}"
              f"{colds[stage.name] - median:>11.1f} s{warms[stage.name] - median:>6.1f} s")
    print(f"  {'all':<12}{'':>25}{1e3 * total:>14.2f}{1 / total:>10,.1f}")


def input_of(config) -> None:
    """Prints how many images a second reach the step: gathered, brought to the devices and augmented, with no step behind."""
    import jax

    from jaxrd.data.augment import augment
    from jaxrd.threat import example_keys
    from jaxrd.training import loop, parallel
    from jaxrd.training.feeding import Feeder

    mesh, batch_size = parallel.data_mesh(), config.training.batch_size
    parallel.check_batch_size("config.training.batch_size", batch_size, mesh)
    if _INPUT.value == "data":
        _, source = loop.open_data(config)
    else:
        source = _random_source()
    augmentation = dataclasses.replace(config.build_augmentation(), mixing="none")
    key, batches = jax.random.key(0), max(50_000 // batch_size, 1)

    @jax.jit
    def augmented(key, step, images):
        return augment(augmentation, example_keys(jax.random.fold_in(key, step), batch_size), images)

    def feeder(first):
        return Feeder(source, mesh, seed=0, batch_size=batch_size, first=first, resident=config.data.resident)

    def seconds_per_batch(pipeline) -> float:
        results, seconds = [], []
        with feeder(0) as batch_stream:
            for _ in range(_repeats(7) + 1):
                began = time.perf_counter()
                for step in range(batches):
                    results = [*results[-2:], pipeline(step, batch_stream)]
                    jax.block_until_ready(results[0])
                jax.block_until_ready(results)
                seconds.append((time.perf_counter() - began) / batches)
        return statistics.median(seconds[1:])

    with feeder(0) as batch_stream:
        one = next(batch_stream)["images"]
        resident = batch_stream.resident
    times = {
        "gathered and brought there": seconds_per_batch(lambda step, stream: next(stream)["images"]),
        "augmented": seconds_per_batch(lambda step, stream: augmented(key, step, one)),
        "both, as in training": seconds_per_batch(lambda step, stream: augmented(key, step, next(stream)["images"]))}
    print(f"{len(source):,} images {'x'.join(map(str, source.image_shape))} {source.images.dtype}, batch {batch_size}, shift "
          f"{augmentation.shift}, flip {augmentation.flip}, cutout {augmentation.cutout}, "
          f"{'resident on' if resident else 'brought to'} {mesh.size} {jax.default_backend()} device(s), "
          f"{os.cpu_count()} cores; medians of {_repeats(7)} times {batches} batches")
    for name, seconds in times.items():
        print(f"  {name:<32}{1e3 * seconds:9.3f} ms a batch {batch_size / seconds:>12,.0f} images/s")


def scaling_of(config) -> None:
    """Prints how many devices would do on paper, or what they tell each other in the compiled step."""
    import jax

    from jaxrd.training import scaling

    counts = _counts("scaling" if _SCALING.value else "collectives", _SCALING.value or _COLLECTIVES.value)
    recipe, teacher_variables, mesh = _untrained(config)
    if _COLLECTIVES.value:
        print(f"{recipe.method.name}, student {config.student}, batch {config.training.batch_size}, "
              f"{jax.default_backend()}, jax {jax.__version__}\n")
        print(scaling.collectives_table(recipe, teacher_variables, counts, config.training.batch_size))
        return
    cost = scaling.step_cost(recipe, mesh, teacher_variables)
    print(f"{recipe.method.name}, student {config.student}, teacher {recipe.teacher.name if recipe.teacher else 'none'}: "
          f"{cost.flops / 1e9:,.1f} GFLOP an image ({cost.last_flops / 1e9:.1f} in the forward and backward pass that gives "
          f"the gradient), gradient {cost.gradient_bytes / 1e6:.1f} MB, checkpoint {cost.state_bytes / 1e6:.1f} MB, "
          f"{cost.image_bytes:,} bytes an image; assumed: {_DEVICE_FLOPS.value:.3g} FLOP/s a device, {_LINK_BYTES.value:.3g} "
          f"bytes/s a link, {_LINK_LATENCY.value:.3g} s a hop\n")
    print(scaling.paper_table(cost, [
        scaling.on_paper(cost, count, _BATCH_PER_DEVICE.value, _DEVICE_FLOPS.value, _LINK_BYTES.value, _LINK_LATENCY.value)
        for count in counts]))


def _counts(flag: str, values: list[str]) -> list[int]:
    import jax

    from jaxrd.errors import InputError

    if not all(value.strip().isdecimal() and int(value) for value in values):
        raise InputError(f"--{flag}={','.join(values)}; give numbers of devices, such as 1,4,8")
    counts = [int(value) for value in values]
    if flag == "collectives" and max(counts) > jax.device_count():
        raise InputError(f"--collectives={','.join(values)}, but there are {jax.device_count()} devices; add "
                         f"--cpu_devices={max(counts)}")
    return counts


def _untrained(config):
    """Returns (recipe, shapes of the teacher's variables, mesh); with --input=32x32x3 there need be no data."""
    import types

    import jax

    from jaxrd import models
    from jaxrd.training import loop, parallel

    mesh = parallel.data_mesh(jax.devices()[:1])
    if _INPUT.value and _INPUT.value != "data":
        source = _random_source()
        dataset = types.SimpleNamespace(train=source)
    else:
        dataset, source = loop.open_data(config)
    teacher = models.create(_TEACHER_MODEL.value or config.student, classes=source.classes, image_shape=source.image_shape)
    recipe, _ = loop.build_recipe(config, dataset, source.epoch, mesh, teacher=teacher)
    variables = jax.eval_shape(teacher.init, jax.random.key(0)) if recipe.teacher else None
    return recipe, variables, mesh


def _random_source():
    """Returns 50,000 random images of 10 classes, of the shape in --input."""
    import numpy as np

    from jaxrd import data

    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (50_000, *_shape(_INPUT.value)), dtype=np.uint8)
    return data.from_arrays(images, generator.integers(10, size=50_000), classes=10)


def _shape(text: str) -> tuple[int, ...]:
    from jaxrd.errors import InputError

    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
        raise InputError(f'--input={text} is neither "data" nor a shape; write it as in 32x32x3: height, width, channels')
    return tuple(map(int, parts))


def _use_fresh_cache() -> None:
    """Has compiled programs kept in a directory of this process alone."""
    import jax

    cache = tempfile.mkdtemp(prefix="jaxrd-benchmark-")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _repeats(default: int = 30) -> int:
    return _REPEATS.value or default


def _prepare(config, mesh):
    """Returns (recipe, teacher's variables, state, batch, source) of a configuration, on the devices."""
    import jax

    from jaxrd import models
    from jaxrd.training import loop, parallel, state as states
    from jaxrd.training.step import shardings

    parallel.check_batch_size("config.training.batch_size", config.training.batch_size, mesh,
                              accumulation=config.training.accumulation, bn_groups=config.bn_groups)
    dataset, source = loop.open_data(config)
    teacher_model = None
    if _TEACHER_MODEL.value:
        teacher_model = models.create(_TEACHER_MODEL.value, classes=source.classes, image_shape=source.image_shape)
    recipe, teacher_variables = loop.build_recipe(config, dataset, source.epoch, mesh, teacher=teacher_model)
    state = states.create(
        recipe.student, recipe.optimizer, jax.random.key(config.seed), weight_average=recipe.averages)
    state = parallel.replicate(state, mesh, shardings(recipe, mesh))
    with _feeder(config, source, recipe, mesh) as batches:
        batch = next(batches)
    return recipe, teacher_variables, state, batch, source


def _feeder(config, source, recipe, mesh):
    from jaxrd.training.feeding import Feeder

    return Feeder(source, mesh, seed=config.seed, batch_size=config.training.batch_size,
                  partners=recipe.augmentation.mixes, negatives=recipe.method.negatives, resident=config.data.resident,
                  accumulation=recipe.accumulation)


def parts_of(config) -> None:
    import jax

    _use_fresh_cache()
    from jaxrd import attacks
    from jaxrd.training import parallel, step as steps

    mesh = parallel.data_mesh()
    recipe, teacher_variables, state, batch, source = _prepare(config, mesh)
    key = jax.random.key(1)

    def compile_step():
        began = time.perf_counter()
        compiled = steps.make_train_step(recipe, mesh).lower(state, teacher_variables, batch).compile()
        return compiled, time.perf_counter() - began

    train_step, cold = compile_step()
    jax.clear_caches()
    _, cached = compile_step()

    # Each part on the outputs of the one before; of accumulated batches, of one micro-batch.
    whole_recipe, parts_are = recipe, ""
    if recipe.accumulation > 1:
        batch = jax.tree.map(lambda array: array[0], batch)
        parts_are = f"; parts: of 1 of {recipe.accumulation} micro-batches"
        recipe = dataclasses.replace(recipe, accumulation=1)
    augment = jax.jit(lambda key, batch: (steps.augment(recipe, key, batch), steps.augment_negatives(recipe, key, batch)))
    attack = jax.jit(lambda *inputs: steps.attack(recipe, *inputs))
    teacher = jax.jit(lambda *inputs: steps.teacher_logits(recipe, *inputs))
    gradients_of = jax.jit(lambda *inputs: steps.gradients_of(recipe, *inputs))
    update = jax.jit(lambda *inputs: steps.update(recipe, *inputs))
    (images, labels), negatives = augment(key, batch)
    views, teacher_clean = attack(key, state, teacher_variables, images, labels, *negatives)
    logits = teacher(teacher_variables, views, teacher_clean, labels, negatives[1])
    gradients, batch_stats, _ = gradients_of(state, views, logits, labels, negatives[1])
    parts = {
        "augmentation": (augment, key, batch),
        f"attack ({recipe.inner.steps} steps)": (attack, key, state, teacher_variables, images, labels, *negatives),
        "teacher": (teacher, teacher_variables, views, teacher_clean, labels, negatives[1]),
        "student loss and gradient": (gradients_of, state, views, logits, labels, negatives[1]),
        "optimiser and weight average": (update, state, gradients, batch_stats),
    }
    if not recipe.method.needs_teacher:
        del parts["teacher"]
    times = {name: _median(lambda: jax.block_until_ready(part(*inputs))) for name, (part, *inputs) in parts.items()}

    def whole():
        nonlocal state
        state, metrics = train_step(state, teacher_variables, next(batches))
        jax.block_until_ready(metrics)

    with _feeder(config, source, whole_recipe, mesh) as batches:
        total = _median(whole)
        waited = batches.waited / (_repeats() + 1)
    # XLA counts the body of a loop once: only where attacks are unrolled does the figure hold.
    unrolled = attacks.loop_unroll() is True
    flops = (train_step.cost_analysis() or {}).get("flops", 0.0) if unrolled else 0.0
    print(f"{recipe.method.name}: {config.student}, batch {config.training.batch_size}, "
          f"{mesh.size} {jax.default_backend()} device(s), {os.cpu_count()} cores; medians of {_repeats()}{parts_are}")
    for name, seconds in times.items():
        print(f"  {name:<32}{1e3 * seconds:9.2f} ms")
    print(f"  {'whole step':<32}{1e3 * total:9.2f} ms   {config.training.batch_size / total:,.0f} images/s"
          + (f", {flops / total / 1e9:,.1f} GFLOP/s" if flops else ""))
    print(f"  {'waiting for input, of it':<32}{1e3 * waited:9.3f} ms   {waited / total:.2%}")
    print(f"  {'compilation':<32}{cold:9.2f} s    {cached:.2f} s from the persistent cache")


def _median(call) -> float:
    """Seconds of a call that waits for its result: the median over repetitions after a first one that compiles."""
    call()
    seconds = []
    for _ in range(_repeats()):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


if __name__ == "__main__":
    command.define_config("configs/digits.py:ard+igdm")
    command.run(main)
