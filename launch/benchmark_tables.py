"""What `launch.benchmark` prints, of the figures that it can also write as JSON."""

import os

import jax

_COLUMN = 34


def parts(figures: dict) -> None:
    """Prints the figures of `jaxrd.performance.measurement.measure`."""
    parts, step = figures["parts"], figures["step"]
    repeats = sorted({part["repeats"] for part in (*parts.values(), *step.values()) if "repeats" in part})
    of = f"{repeats[0]}" if len(repeats) == 1 else f"{repeats[0]} to {repeats[-1]}"
    micro = f"; parts: of 1 of {figures['micro_batches']} micro-batches" if figures["micro_batches"] > 1 else ""
    print(f"{_title(figures)}; medians of {of} [quartiles]{micro}")
    for name, label in (
            ("augmentation", "augmentation"), ("attack", f"attack ({figures['attack_steps']} steps)"), ("teacher", "teacher"),
            ("student forward", "student forward"), ("student backward", "student backward, by difference"),
            ("student", "student loss and gradient"), ("optimiser", "optimiser and weight average")):
        if name in parts:
            speed = parts[name].get("flop_per_second")
            _row(label, parts[name], f"{speed / 1e9:,.1f} GFLOP/s" if speed else "")
    whole = step["whole"]["median_seconds"]
    _row("whole step", step["whole"])
    for name, label in (("input_wait", "waiting for input, of it"), ("dispatch", "host until the call returns, of it"),
                        ("between", "host between two steps, of it")):
        _row(label, step[name], f"{step[name]['median_seconds'] / whole:.2%}")
    _row("as in training", step["in_training"], f"{figures['images_per_second']:,.0f} images/s")
    print("  Parts are compiled alone, so they need not sum to the step, which is one program.")
    _operations(figures)
    _memory(figures["memory"])
    compilation = figures["compilation"]
    print(f"  {'compilation':<{_COLUMN}}{compilation['cold_seconds']:9.2f} s    {compilation['cached_seconds']:.2f} s from the "
          "persistent cache")


def _operations(figures: dict) -> None:
    counted, use = figures["operations"], figures["utilisation"]
    xla, closed, devices = counted["xla"], counted["closed_form"], figures["devices"]
    each = f", {xla['matrix_flop'] / devices / 1e9:,.3f} for each device" if xla and devices > 1 else ""
    if xla:
        print(f"  {'operations, counted by XLA':<{_COLUMN}}{xla['matrix_flop'] / 1e9:9.3f} GFLOP of convolutions and dense "
              f"layers{each}; {xla['other_flop'] / 1e9:,.3f} of all else")
        if xla["has_loop_of_unknown_length"]:
            print("  warning: a loop of unknown length is in the step; its body is counted once")
    else:
        print(f"  {'operations, counted by XLA':<{_COLUMN}}        - JAX_PLATFORMS leaves out the CPU, which counts")
    if closed:
        print(f"  {'operations, in closed form':<{_COLUMN}}{closed['flop'] / 1e9:9.3f} GFLOP of the same "
              f"({closed['with_padding_flop'] / 1e9:,.3f} with the zeros of the padding, as is usual)")
        for part, networks in closed["passes_batches"].items():
            for network, passes in networks.items():
                names = {"forwards": "forward", "image_gradients": "to images", "parameter_gradients": "to parameters"}
                print(f"    {part}: {network} " + ", ".join(
                    f"{passes[key]:g} {name}" for key, name in names.items() if passes[key]))
    else:
        print(f"  {'operations, in closed form':<{_COLUMN}}        - not counted: the method differentiates forward or twice")
    if counted["agree"] is False:
        print(f"  warning: the closed form is {counted['difference']:+.1%} off XLA's count of convolutions and dense layers; "
              "what is computed twice (gradient checkpointing) or by a layer of another kind is in the latter alone")
    if use["flop_per_second_of_a_device"] is None:
        return
    print(f"  {'reached on each device':<{_COLUMN}}{use['flop_per_second_of_a_device'] / 1e9:9,.1f} GFLOP/s")
    kind = figures["device_kind"]
    if use["peak_flop_per_second"] is None:
        why = ("a CPU has no published peak" if figures["platform"] == "cpu" else f"no published peak known for '{kind}'")
        print(f"  {'of the peak':<{_COLUMN}}        - {why}: give --peak_flops")
    elif use["of_peak"] is None:
        print(f"  {'of the peak':<{_COLUMN}}        - no published peak of '{kind}' in "
              f"{' and '.join(use['precisions'])}: give --peak_flops")
    else:
        known = ", ".join(f"{name} {value / 1e12:,.4g}" for name, value in use["peak_flop_per_second"].items())
        print(f"  {'of the peak':<{_COLUMN}}{use['of_peak']:9.1%} ({known} TFLOP/s)")
    for operation, part in use["of_ceiling"].items():
        if part is not None:
            print(f"  {f'of what a {operation} reaches'.replace('a its', 'its'):<{_COLUMN}}{part:9.1%}")
    for one in figures["ceilings"]:
        print(f"    {one['operation']}, {one['precision']}, {one['size']}: {one['flop_per_second'] / 1e9:,.1f} GFLOP/s")


def _memory(memory: dict) -> None:
    if "planned_total_bytes" in memory:
        pieces = ", ".join(f"{name} {_size(memory[f'planned_{name}_bytes'])}" for name in ("temporary", "arguments"))
        print(f"  {'memory of a step, as planned':<{_COLUMN}}{_size(memory['planned_total_bytes']):>12} ({pieces})")
    available = f" of {_size(memory['available_bytes'])}" if memory["available_bytes"] else ""
    for what, name in (("device", "most in use on the device"), ("process", "most in use by this process")):
        if (size := memory.get(f"peak_of_{what}_bytes")) is not None:
            print(f"  {name:<{_COLUMN}}{_size(size):>12}{available}")


def steps(figures: dict, column: str) -> None:
    """Prints steps that were timed in turn."""
    rows = figures["steps"]
    first = next(iter(rows.values()))
    title = _title(figures, without=column)
    print(f"{title}; medians of {first['repeats']} [quartiles], in turn")
    of = f"of {next(iter(rows))}"
    print(f"  {column:<20}{'ms per step':>12}{'quartiles':>22}{of:>14}{'images/s':>11}{'memory':>12}{'compilation':>14}")
    for name, row in rows.items():
        quartiles = f"[{1e3 * row['lower_quartile_seconds']:.2f} .. {1e3 * row['upper_quartile_seconds']:.2f}]"
        memory = _size(row["planned_total_bytes"]) if "planned_total_bytes" in row else "-"
        print(f"  {name:<20}{1e3 * row['median_seconds']:>12.2f}{quartiles:>22}"
              f"{row['median_seconds'] / first['median_seconds']:>13.2f}x{row['images_per_second']:>11,.0f}{memory:>12}"
              f"{row['compilation_seconds']:>12.1f} s")


def straight(line: dict, unit: str) -> None:
    """Prints the lines through a sweep."""
    if "seconds_slope" not in line:
        print("  one value: no line goes through it")
        return
    print(f"  {1e3 * line['seconds_slope']:.3f} ms for each {unit} and {1e3 * line['seconds_intercept']:.3f} ms besides (least "
          f"squares; at most {line['seconds_largest_deviation']:.1%} off)")
    if "planned_temporary_bytes_slope" in line:
        print(f"  {_size(line['planned_temporary_bytes_slope'])} of temporary memory for each {unit} and "
              f"{_size(line['planned_temporary_bytes_intercept'])} besides")


def trace(figures: dict, directory: str) -> None:
    """Prints where the time of a step goes."""
    found = figures["trace"]
    wall, events = found["wall_seconds"], sum(found["by_kind_seconds"].values())
    print(f"{_title(figures)}; a trace of {found['steps']} steps in {directory}")
    pooled = (f"; {found['pooled_seconds'] / wall:.1%} more, in which a pool of threads works on convolutions, count as theirs"
              if found["pooled_seconds"] else "")
    rest = max(0.0, 1 - (found["covered_seconds"] + found["pooled_seconds"]) / wall)
    print(f"  {1e3 * wall:.2f} ms a step, of which events cover {found['covered_seconds'] / wall:.1%}{pooled}; "
          f"{rest:.1%} is in none")
    for title, key in (("scope", "by_scope_seconds"), ("kind of operation", "by_kind_seconds")):
        print(f"  by {title}")
        for name, seconds in found[key].items():
            print(f"    {name:<{_COLUMN - 2}}{1e3 * seconds:9.2f} ms {seconds / events:>7.1%}")
    print(f"  {len(found['top'])} longest operations")
    for one in found["top"]:
        print(f"    {1e3 * one['seconds']:9.2f} ms {one['seconds'] / events:>6.1%} {one['times']:>4g}x {one['kind']:<18}"
              f"{one['scope']:<13}{one['instruction']}  {one['op_name']}")


def attacks(figures: dict) -> None:
    """Prints the rates of AutoAttack's attacks."""
    print(f"{figures['student']}, {figures['images']} images a batch, {figures['norm']}, {jax.default_backend()}, "
          f"{os.cpu_count()} cores; medians of {figures['repeats']}, in turn")
    print(f"  {'attack':<12}{'runs':>5}{'forwards':>10}{'backwards':>10}{'ms per image':>14}{'images/s':>10}"
          f"{'compilation':>13}{'cached':>8}")
    total = 0.0
    for name, rate in figures["attacks"].items():
        each = rate["seconds_per_image"]
        total += each
        print(f"  {name:<12}{rate['runs']:>5}{rate['forwards']:>10,}{rate['backwards']:>10,}{1e3 * each:>14.2f}"
              f"{1 / each:>10,.1f}{rate['cold_seconds']:>11.1f} s{rate['cached_seconds']:>6.1f} s")
    print(f"  {'all':<12}{'':>25}{1e3 * total:>14.2f}{1 / total:>10,.1f}")


def inputs(figures: dict) -> None:
    """Prints the rates of the input."""
    of, batch = figures["augmentation"], figures["batch_size"]
    print(f"{figures['images']:,} images {'x'.join(map(str, figures['image_shape']))} {figures['dtype']}, batch {batch}, shift "
          f"{of['shift']}, flip {of['flip']}, cutout {of['cutout']}, "
          f"{'resident on' if figures['resident'] else 'brought to'} {figures['devices']} {jax.default_backend()} device(s), "
          f"{os.cpu_count()} cores; medians of {figures['repeats']} times {figures['batches']} batches")
    for name, spread in figures["seconds_per_batch"].items():
        seconds = spread["median_seconds"]
        print(f"  {name:<32}{1e3 * seconds:9.3f} ms a batch {batch / seconds:>12,.0f} images/s")


def cost(cost, recipe, student: str, device_flops: float, link_bytes: float, link_latency: float) -> None:
    """Prints what a step takes, and what is assumed of devices and links."""
    print(f"{recipe.method.name}, student {student}, teacher {recipe.teacher.name if recipe.teacher else 'none'}: "
          f"{cost.flops / 1e9:,.1f} GFLOP an image ({cost.last_flops / 1e9:.1f} in the forward and backward pass that gives "
          f"the gradient), gradient {cost.gradient_bytes / 1e6:.1f} MB, checkpoint {cost.state_bytes / 1e6:.1f} MB, "
          f"{cost.image_bytes:,} bytes an image; assumed: {device_flops:.3g} FLOP/s a device, {link_bytes:.3g} bytes/s a link, "
          f"{link_latency:.3g} s a hop\n")


def _title(figures: dict, without: str = "") -> str:
    words = [f"{figures['method']}: {figures['student']}" if without != "method" else figures["student"]]
    if figures["teacher"]:
        words.append(f"teacher {figures['teacher']}")
    if without != "images":
        words.append(f"batch {figures['batch_size']}")
    if without != "attack steps":
        words.append(f"{figures['attack_steps']} attack steps")
    kind = f" ({figures['device_kind']})" if figures["platform"] != "cpu" else ""
    return ", ".join([*words, f"{figures['devices']} {figures['platform']} device(s){kind}", f"{figures['cores']} cores"])


def _row(label: str, part: dict, more: str = "") -> None:
    quartiles = "" if "lower_quartile_seconds" not in part else (
        f"[{1e3 * part['lower_quartile_seconds']:.3f} .. {1e3 * part['upper_quartile_seconds']:.3f}]")
    print(f"  {label:<{_COLUMN}}{1e3 * part['median_seconds']:9.3f} ms  {quartiles:<22}{more}".rstrip())


def _size(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB" if abs(size) >= 2**30 else f"{size / 2**20:,.1f} MiB"
