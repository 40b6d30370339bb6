"""What `launch.benchmark` says of what surrounds the step: its input, the attacks that evaluate, and many devices on paper."""

import types

from launch import benchmark_tables as tables


def attacks(config, source, names: list[str], repeats: int) -> dict:
    """Prints and returns the rates of attacks of AutoAttack, see `jaxrd.performance.rates.attack_rates`."""
    import dataclasses

    from jaxrd.performance.rates import attack_rates

    images, rates = attack_rates(config, source, names, repeats)
    figures = {"student": config.student, "images": images, "norm": config.threat.norm, "repeats": repeats,
               "attacks": {name: dataclasses.asdict(rate) for name, rate in rates.items()}}
    tables.attacks(figures)
    return figures


def inputs(config, source, mesh, repeats: int) -> dict:
    """Prints and returns the rates of the input, see `jaxrd.performance.rates.input_rates`."""
    from jaxrd.performance.rates import input_rates

    rates = input_rates(config, source, mesh, repeats)
    figures = {"images": len(source), "image_shape": list(source.image_shape), "dtype": str(source.images.dtype),
               "batch_size": config.training.batch_size, "augmentation": config.to_dict()["data"], "resident": rates.resident,
               "devices": mesh.size, "batches": rates.batches, "repeats": repeats,
               "seconds_per_batch": {name: spread.to_dict() for name, spread in rates.seconds.items()}}
    tables.inputs(figures)
    return figures


def untrained(config, source, teacher_model: str) -> tuple:
    """Returns (recipe, shapes of the teacher's variables, mesh) of a step that nobody runs, on one device."""
    import jax

    from jaxrd import models
    from jaxrd.training import opening, parallel

    mesh = parallel.data_mesh(jax.devices()[:1])
    teacher = models.create(teacher_model, classes=source.classes, image_shape=source.image_shape)
    recipe, _ = opening.build_recipe(config, types.SimpleNamespace(train=source), source.epoch, mesh, teacher=teacher)
    return recipe, jax.eval_shape(teacher.init, jax.random.key(0)) if recipe.teacher else None, mesh


def collectives(config, recipe, teacher_variables, mesh, counts: list[int]) -> None:
    """Prints what so many devices tell each other in the compiled step."""
    import jax

    from jaxrd.training import scaling

    print(f"{recipe.method.name}, student {config.student}, batch {config.training.batch_size}, "
          f"{jax.default_backend()}, jax {jax.__version__}\n")
    print(scaling.collectives_table(recipe, teacher_variables, counts, config.training.batch_size))


def on_paper(
    config, recipe, teacher_variables, mesh, counts: list[int], batch_per_device: int, *speeds: float, pixels,
) -> None:
    """Prints how so many devices would do, of these FLOP/s, with links of these bytes/s and seconds a hop."""
    from jaxrd.training import scaling

    cost = scaling.step_cost(recipe, mesh, teacher_variables, pixels=pixels)
    tables.cost(cost, recipe, config.student, *speeds)
    print(scaling.paper_table(cost, [scaling.on_paper(cost, count, batch_per_device, *speeds) for count in counts]))
