"""Weights in and out of run directories.

    python -m launch.weights zoo [TEXT]                             published teachers, and the files to download by hand
    python -m launch.weights import --model=Wang2023Better_WRN-28-10 --classes=100 --source=x.pt --workdir=teachers/bdm
    python -m launch.weights import --format=robustbench --model=dm_wrn28_10 --source=x.pt --workdir=teachers/bdm
    python -m launch.weights export --format=torch --workdir=runs/a --output=a.pt       also safetensors, stablehlo

An import makes a run directory, usable as --config.teacher and by launch.evaluate; it needs no PyTorch and executes nothing
that a file holds. An export is read again and compared before it takes its name.
"""

import sys

from absl import flags

from jaxrd.errors import InputError, choose
from launch import command

_COMMANDS = ("import", "export", "zoo")
_FORMAT = flags.DEFINE_string(
    "format", "", "import: robustbench, official or torch (all .pt), safetensors, or haiku (DeepMind's .npy); by default what "
    "the file turns out to be. export: torch, safetensors or stablehlo.")
_WORKDIR = flags.DEFINE_string("workdir", "", "Run directory: import makes it, export reads it.")
_SOURCE = flags.DEFINE_string("source", "", "import: the file of weights.")
_MODEL = flags.DEFINE_string(
    "model", "", "import: architecture, or a name in the list of `launch.weights zoo`; not needed for safetensors of jaxrd. "
    "zoo: what to look for.")
_CLASSES = flags.DEFINE_integer("classes", None, "import: classes that the file must have.", lower_bound=2)
_IMAGE_SHAPE = flags.DEFINE_string("image_shape", "", "import: height,width,channels; by default 32,32 and what the file has.")
_NORMALIZATION = flags.DEFINE_string(
    "normalization", "", "import: none, cifar10, cifar100, tiny_imagenet, or mean and std of each channel: "
    "0.5,0.5,0.5,0.2,0.2,0.2; by default that of the published model, of the file, or of the architecture's public class.")
_ENTRY = flags.DEFINE_string("entry", None, 'import: which dictionary of a checkpoint to take, such as "model_state_dict".')
_ALLOW_UNUSED = flags.DEFINE_bool("allow_unused", False, "import: leave out arrays that the model has no use for.")
_DATA = flags.DEFINE_string(
    "data", "", "import: prepared TFDS data set, or train.npz,test.npz, on whose test images the clean accuracy is checked.")
_EXAMPLES = flags.DEFINE_integer("examples", 1000, "import: how many of them, from the first on; 0 for all.", lower_bound=0)
_NORM = flags.DEFINE_string("norm", "", "import: linf or l2, with --epsilon: what launch.evaluate will attack within.")
_EPSILON = flags.DEFINE_string("epsilon", None, "import: radius, such as 8/255; by default what is published, or L-inf 8/255.")
_ANY_ACCURACY = flags.DEFINE_bool("any_accuracy", False, "import: accept an accuracy that is far from the published one.")
_OUTPUT = flags.DEFINE_string("output", "", "export: the file to write.")
_STEP = flags.DEFINE_string("step", "last", 'export: "last", "best" by validation PGD accuracy, or a step\'s number.')
_BATCH_NORM_SET = flags.DEFINE_integer("batch_norm_set", 0, "export: which set, where the model has several.", lower_bound=0)
_SUB_BLOCK1 = flags.DEFINE_bool(
    "sub_block1", False, "export: with the entries that some classes of TRADES' wide ResNet register and never call.")


def main(chosen: str, text: str) -> None:
    if chosen == "zoo":
        from jaxrd.models import published
        print(published.table(text or _MODEL.value))
        return
    if text:
        raise InputError(f'"{text}" is not a flag; flags begin with -- and take their value after =')
    needed = {"import": (_SOURCE, _WORKDIR), "export": (_FORMAT, _WORKDIR, _OUTPUT)}[chosen]
    for flag in needed:
        if not flag.value:
            raise InputError(f"--{flag.name} is missing; {chosen} needs {', '.join(f'--{each.name}' for each in needed)}")
    from jaxrd.training import exchange, parallel
    parallel.enable_compilation_cache()
    if chosen == "import":
        exchange.import_weights(
            _SOURCE.value, _WORKDIR.value, _MODEL.value, format=_FORMAT.value, classes=_CLASSES.value,
            image_shape=_numbers(_IMAGE_SHAPE, int) if _IMAGE_SHAPE.value else None, normalization=_normalization(),
            container=_ENTRY.value, allow_unused=_ALLOW_UNUSED.value, data=_DATA.value, examples=_EXAMPLES.value,
            any_accuracy=_ANY_ACCURACY.value, norm=_NORM.value, epsilon=_EPSILON.value)
    else:
        step = int(_STEP.value) if _STEP.value.isdecimal() else _STEP.value
        exchange.export_weights(
            _WORKDIR.value, _OUTPUT.value, _FORMAT.value, step=step, batch_norm_set=_BATCH_NORM_SET.value,
            sub_block1=_SUB_BLOCK1.value)


def _normalization():
    """Returns the name that was given, or (mean, std)."""
    if not _NORMALIZATION.value or "," not in _NORMALIZATION.value:
        return _NORMALIZATION.value
    values = _numbers(_NORMALIZATION, float)
    if len(values) % 2:
        raise InputError(
            f"--normalization={_NORMALIZATION.value} has {len(values)} numbers; give as many means as stds, means first")
    return values[:len(values) // 2], values[len(values) // 2:]


def _numbers(flag, kind) -> tuple:
    try:
        return tuple(kind(part) for part in flag.value.split(","))
    except ValueError:
        raise InputError(f"--{flag.name}={flag.value}: give numbers with commas between them") from None


def _take_words() -> list[str]:
    """Removes the words that are neither flags nor their values from the command line, and returns them."""
    words, index = [], 1
    while index < len(sys.argv):
        argument = sys.argv[index]
        name = argument.lstrip("-")
        if not argument.startswith("-"):
            words.append(sys.argv.pop(index))
        elif "=" not in argument and name in flags.FLAGS and not flags.FLAGS[name].boolean:
            index += 2
        else:
            index += 1
    return words


def _checked(words: list[str]) -> None:
    if not words:
        raise InputError("what to do is missing; give import, export or zoo first: python -m launch.weights import ...")
    choose("command", words[0], _COMMANDS)
    main(words[0], " ".join(words[1:]))


if __name__ == "__main__":
    words = _take_words()
    command.run(lambda: _checked(words))
