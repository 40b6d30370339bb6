"""Times a config's train step, part by part: `python -m launch.benchmark --config=configs/digits.py:ard+igdm`.

Medians with their quartiles, timed in turn, on this machine, with the config's own data, models and batch size; operations of
the step, by XLA's cost analysis and in closed form, against the device's published peak and against what a product and a
convolution reach here; memory; compilation, from nothing and from a persistent cache that the first one filled. The parts are
compiled alone, so they need not sum to the step, which XLA fuses as one program. Data that is not there can be random, and a
teacher that is not there untrained:

    python -m launch.benchmark --config=configs/cifar10.py:rslad --random_images=32x32x3 --teacher_model=resnet18
        --config.training.batch_size=16 --json=rslad.json

In place of the parts of one step:

    python -m launch.benchmark --config=configs/digits.py:ard+igdm --methods=pgd_at,ard,adaad,path      steps side by side
    python -m launch.benchmark --config=configs/digits.py:pgd_at --sweep_attack_steps=1,5,10 --sweep_batch=32,64    is it linear
    python -m launch.benchmark --config=configs/digits.py:pgd_at --trace=runs/trace                     what the time goes into
    python -m launch.benchmark --config=configs/digits.py:ard+igdm --compare=torch                      in turn with PyTorch
    python -m launch.benchmark --config=configs/digits.py:ard --attacks=apgd-ce,apgd-t,fab-t,square     AutoAttack, images/s
    python -m launch.benchmark --config=configs/cifar10.py:rslad --input=32x32x3                        input alone, images/s
    python -m launch.benchmark --config=configs/cifar10.py:rslad+igdm --scaling=8,64,1024               on paper: nothing is run
    python -m launch.benchmark --config=configs/digits.py:rslad+igdm --collectives=1,4,8 --cpu_devices=8    of the compiled step
"""

import atexit
import contextlib
import pathlib
import shutil
import tempfile

from absl import flags

from launch import benchmark_surroundings as surroundings, benchmark_tables as tables, command, start

_REPEATS = flags.DEFINE_integer(
    "repeats", None, "Timed calls of each part; by default 5 to 30, as they take (5 with --attacks, 7 with --input).",
    lower_bound=1)
_TEACHER_MODEL = flags.DEFINE_string(
    "teacher_model", None, "Architecture of an untrained teacher to time instead of config.teacher.")
_RANDOM_IMAGES = flags.DEFINE_string(
    "random_images", None, "Shape of random images to take instead of the config's data, such as 32x32x3.")
_CLASSES = flags.DEFINE_integer("classes", 10, "Classes of the random images.")
_PEAK_FLOPS = flags.DEFINE_float(
    "peak_flops", None, "Operations a second of one device at its peak, such as 989e12, in place of the published figure.")
_CEILINGS = flags.DEFINE_bool("ceilings", True, "Measure what a large product and the networks' convolution reach.")
_JSON = flags.DEFINE_string("json", None, "Write all figures to this file too, units in their names.")
_METHODS = flags.DEFINE_list(
    "methods", None, "Time whole steps of these methods, side by side, instead of the parts of one.")
_SWEEP_ATTACK_STEPS = flags.DEFINE_list(
    "sweep_attack_steps", None, "Time whole steps with so many attack steps, side by side, and their memory: 1,5,10,20.")
_SWEEP_BATCH = flags.DEFINE_list(
    "sweep_batch", None, "Time whole steps of these batch sizes, side by side, and their memory: 8,16,32.")
_TRACE = flags.DEFINE_string(
    "trace", None, "Capture a trace of a few steps into this directory, and print where their time goes.")
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
_COMPARE = flags.DEFINE_enum(
    "compare", None, ["torch"], "Time the step in turn with the same step in plain PyTorch, on one device (extra: parity).")
_TORCH_VARIANTS = flags.DEFINE_list(
    "torch_variants", None, "With --compare: eager, channels_last, bf16, compile, compile+bf16; all, on CPU but the last.")
_TORCH_FORWARDS = flags.DEFINE_enum(
    "torch_forwards", "least", ["least", "published"], "With --compare: the forwards that are needed, or published code's.")
start.define_flags()


def main() -> None:
    config = command.config()
    mode = _mode()
    _check_json()
    if _COMPARE.value:
        from launch.pytorch import comparison
        comparison.require_torch()
        comparison.share_accelerator()
    if _TRACE.value:
        # On GPUs: kernels that XLA starts together, as one graph, have no instruction's name in a trace.
        start.add_xla_flag("--xla_gpu_enable_command_buffer=")
    start.initialize()
    from jaxrd.training import parallel, processes
    parallel.prepare_process()  # as training does
    with contextlib.nullcontext() if processes.is_main() else contextlib.redirect_stdout(None):
        figures = mode(config)
        if _JSON.value and processes.is_main():
            _write_json(figures)


def _mode():
    """Returns the function of what was asked for; InputError for two things at once."""
    from jaxrd.errors import InputError

    modes = [("methods", _METHODS.value, methods_of), ("sweep_attack_steps", _SWEEP_ATTACK_STEPS.value, sweeps_of),
             ("sweep_batch", _SWEEP_BATCH.value, sweeps_of), ("trace", _TRACE.value, trace_of),
             ("attacks", _ATTACKS.value, attacks_of), ("scaling", _SCALING.value, scaling_of),
             ("collectives", _COLLECTIVES.value, scaling_of), ("input", _INPUT.value, input_of),
             ("compare", _COMPARE.value, torch_of)]
    asked = [(name, mode) for name, value, mode in modes if value]
    if asked and asked[0][1] is scaling_of:
        asked = [one for one in asked if one[0] != "input"]  # which only says the shape there
    if len({mode for _, mode in asked}) > 1:
        raise InputError(f"--{asked[0][0]} and --{asked[1][0]} are two things to do; give one of them at a time")
    if asked and asked[0][1] is scaling_of and _JSON.value:
        raise InputError(f"--json={_JSON.value}: --{asked[0][0]} measures nothing that it could hold; leave it out")
    return asked[0][1] if asked else parts_of


def _check_json() -> None:
    from jaxrd.errors import InputError

    if _JSON.value and (pathlib.Path(_JSON.value).is_dir() or not pathlib.Path(_JSON.value).absolute().parent.is_dir()):
        raise InputError(f"--json={_JSON.value} is no file in a directory that exists; give one, such as benchmark.json")


def _write_json(figures: dict) -> None:
    from jaxrd.files import disk_explained
    from jaxrd.training.log import write_json

    with disk_explained(f"--json={_JSON.value}"):
        write_json(pathlib.Path(_JSON.value), figures)


def _workload(config, devices: list | None = None):
    from jaxrd.performance.workload import open_workload
    from jaxrd.training import parallel

    shape = _shape("random_images", _RANDOM_IMAGES.value) if _RANDOM_IMAGES.value else None
    return open_workload(config, parallel.data_mesh(devices), random_images=shape, classes=_CLASSES.value,
                         teacher_model=_TEACHER_MODEL.value)


def parts_of(config) -> dict:
    """Prints what the parts of one step take, and its operations, memory and compilation."""
    from jaxrd.performance.measurement import measure

    _use_fresh_cache()
    figures = measure(
        _workload(config), repeats=_REPEATS.value, peak_flops=_PEAK_FLOPS.value, with_ceilings=_CEILINGS.value)
    tables.parts(figures)
    return figures


def methods_of(config) -> dict:
    """Prints the step time of several methods on one machine."""
    return _compare({name.strip(): _changed(config, "method", name=name.strip(), igdm=None) for name in _METHODS.value},
                    "method")


def sweeps_of(config) -> dict:
    """Prints step time and memory for several numbers of attack steps, or several batch sizes, and a line through them."""
    from jaxrd.performance.steps import line

    figures = {}
    for flag, values, section, field, unit in (
            ("sweep_attack_steps", _SWEEP_ATTACK_STEPS.value, "attack", "steps", "attack step"),
            ("sweep_batch", _SWEEP_BATCH.value, "training", "batch_size", "image")):
        if values:
            numbers = sorted(set(_numbers(flag, values, "1,5,10" if section == "attack" else "8,16,32")))
            found = _compare({str(number): _changed(config, section, **{field: number}) for number in numbers}, f"{unit}s")
            rows = list(found["steps"].values())
            found["line"] = {
                f"{name}_{what}": getattr(fit, what) for name, key in (
                    ("seconds", "median_seconds"), ("planned_temporary_bytes", "planned_temporary_bytes"))
                if all(key in row for row in rows) and (fit := line(numbers, [row[key] for row in rows]))
                for what in ("slope", "intercept", "largest_deviation")}
            tables.straight(found["line"], unit)
            figures[flag] = found
    return figures


def _compare(configs: dict, column: str) -> dict:
    from jaxrd.performance.measurement import header
    from jaxrd.performance.steps import side_by_side

    workloads = {name: _workload(config) for name, config in configs.items()}
    found = side_by_side(workloads, _REPEATS.value)
    figures = header(next(iter(workloads.values()))) | {"steps": {name: one.to_dict() for name, one in found.items()}}
    tables.steps(figures, column)
    return figures


def _changed(config, section: str, **values):
    from jaxrd.config import Config

    old = config.to_dict()
    return Config.from_dict(old | {section: old[section] | values})  # which checks it


def torch_of(config) -> dict:
    """Prints how long the step takes beside PyTorch's."""
    import jax

    from launch import benchmark_torch

    workload = _workload(config, jax.devices()[:1])
    return benchmark_torch.compare(workload, _TORCH_VARIANTS.value, _TORCH_FORWARDS.value, _REPEATS.value)


def trace_of(config) -> dict:
    """Prints where the time of a step goes, by a trace of a few."""
    from jaxrd.performance import profiling
    from jaxrd.performance.measurement import header

    workload = _workload(config)
    step, _ = workload.compile()
    profiling.capture(workload, step, _TRACE.value)
    figures = header(workload) | {"trace": profiling.where_time_goes(_TRACE.value, step.as_text())}
    tables.trace(figures, _TRACE.value)
    return figures


def attacks_of(config) -> dict:
    """Prints how many images of each attack of AutoAttack a second sees to the end, for images that stay robust."""
    from jaxrd.training import opening

    _use_fresh_cache()
    random_images = _RANDOM_IMAGES.value
    source = _random_source("random_images", random_images) if random_images else opening.open_own_data(config)[0].test
    return surroundings.attacks(config, source, [name.strip() for name in _ATTACKS.value], _REPEATS.value or 5)


def input_of(config) -> dict:
    """Prints how many images a second reach the step: gathered, brought to the devices and augmented, with no step behind."""
    from jaxrd.training import opening, parallel

    source = opening.open_data(config)[1] if _INPUT.value == "data" else _random_source("input", _INPUT.value)
    return surroundings.inputs(config, source, parallel.data_mesh(), _REPEATS.value or 7)


def scaling_of(config) -> dict:
    """Prints how many devices would do on paper, or what they tell each other in the compiled step."""
    import jax

    from jaxrd.errors import InputError
    from jaxrd.training import opening

    flag, values = ("scaling", _SCALING.value) if _SCALING.value else ("collectives", _COLLECTIVES.value)
    counts = _numbers(flag, values, "1,4,8")
    if flag == "collectives" and max(counts) > jax.device_count():
        raise InputError(f"--collectives={','.join(values)}, but there are {jax.device_count()} devices; add "
                         f"--cpu_devices={max(counts)}")
    shape = ("random_images", _RANDOM_IMAGES.value) if _RANDOM_IMAGES.value else ("input", _INPUT.value)
    source = _random_source(*shape) if shape[1] and shape[1] != "data" else opening.open_data(config)[1]
    untrained = surroundings.untrained(config, source, _TEACHER_MODEL.value or config.student)
    if flag == "collectives":
        surroundings.collectives(config, *untrained, counts)
    else:
        surroundings.on_paper(config, *untrained, counts, _BATCH_PER_DEVICE.value, _DEVICE_FLOPS.value, _LINK_BYTES.value,
                              _LINK_LATENCY.value, pixels=source.images.dtype)
    return {}


def _numbers(flag: str, values: list[str], example: str) -> list[int]:
    from jaxrd.errors import InputError

    if not all(value.strip().isdecimal() and int(value) for value in values):
        raise InputError(f"--{flag}={','.join(values)}; give whole numbers above 0, such as {example}")
    return [int(value) for value in values]


def _random_source(flag: str, text: str):
    from jaxrd.performance.workload import random_source

    return random_source(_shape(flag, text), _CLASSES.value)


def _shape(flag: str, text: str) -> tuple[int, ...]:
    from jaxrd.errors import InputError

    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
        data = 'neither "data" nor' if flag == "input" else "not"
        raise InputError(f"--{flag}={text} is {data} a shape; write it as in 32x32x3: height, width, channels")
    return tuple(map(int, parts))


def _use_fresh_cache() -> None:
    """Has compiled programs kept in a directory of this process alone."""
    import jax

    cache = tempfile.mkdtemp(prefix="jaxrd-benchmark-")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


if __name__ == "__main__":
    command.define_config("configs/digits.py:ard+igdm")
    command.run(main)
