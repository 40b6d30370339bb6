"""Prepares data sets, once for each machine or shared disk; training then reads them without TensorFlow and without a network.

    python -m launch.prepare --npz=train.npz,test.npz --name=mine               or train.npz,validation.npz,test.npz
    python -m launch.prepare --npz=1m.npz --name=generated                      images to mix in: --config.data.extra=generated
    python -m launch.prepare --folder=photos --name=mine --image_size=64        photos/train/CLASS/*.png, photos/test/CLASS/...
    python -m launch.prepare --dataset=tiny_imagenet --source=tiny-imagenet-200.zip
    python -m launch.prepare --dataset=cifar10                                  TFDS downloads; pip install 'jaxrd[prepare]'
    python -m launch.prepare --dataset=cifar10 --source=cifar-10-binary.tar.gz  downloaded by hand
    python -m launch.prepare --dataset='cifar10_corrupted/*'                    all configs of a data set

An .npz file holds `images` [n, height, width, channel] (uint8, or float32 in [0, 1]) and `labels` [n], or `image` and `label`.
What is prepared is there whole or not at all. After an interruption the same command goes on; of several at once one does the
work and the others wait for it.
"""

import functools

from absl import flags

from jaxrd.errors import InputError
from launch import command

_DATASET = flags.DEFINE_string("dataset", "", "Name of a data set that TFDS knows, tiny_imagenet, or a pattern: name/*.")
_NPZ = flags.DEFINE_list("npz", [], "train.npz,test.npz; train.npz,validation.npz,test.npz; or one file.")
_FOLDER = flags.DEFINE_string("folder", "", "Folder with train/ and test/ (and validation/), a folder for each class in them.")
_NAME = flags.DEFINE_string("name", "", "--npz, --folder: name for the data set, such as my_images.")
_SOURCE = flags.DEFINE_string("source", "", "--dataset: archive, or directory of archives, that was downloaded by hand.")
_IMAGE_SIZE = flags.DEFINE_integer(
    "image_size", None, "--folder, tiny_imagenet: resize the images to a square of this side.", lower_bound=1)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Where data sets are; by default where TFDS keeps them.")

_SPLITS = {1: ("train",), 2: ("train", "test"), 3: ("train", "validation", "test")}


def main() -> None:
    directory = _DATA_DIR.value or None  # an empty one is an unset variable of a shell
    given = [flag for flag in (_DATASET, _NPZ, _FOLDER) if flag.value]
    if len(given) != 1:
        names = " and ".join(f"--{flag.name}" for flag in given) if given else "neither --dataset nor --npz nor --folder"
        raise InputError(f"{names} given; give exactly one of --dataset, --npz and --folder")
    (what,) = given
    for flag, goes_with in ((_NAME, (_NPZ, _FOLDER)), (_SOURCE, (_DATASET,)), (_IMAGE_SIZE, (_FOLDER, _DATASET))):
        if flag.value and not any(what is each for each in goes_with):  # flags refuse to be compared by ==
            raise InputError(f"--{flag.name} does not go with --{what.name}; leave it out")
    if what is not _DATASET and not _NAME.value:
        raise InputError(f"--name is missing; say what the data set is to be called: --{what.name}=... --name=my_images")
    if _NPZ.value and len(_NPZ.value) not in _SPLITS:
        raise InputError(f"--npz={','.join(_NPZ.value)}: give two files, train.npz,test.npz, or three, "
                         "train.npz,validation.npz,test.npz, or one to mix in (--config.data.extra)")
    if _IMAGE_SIZE.value and what is _DATASET and _DATASET.value != "tiny_imagenet":
        raise InputError(f"--image_size does not go with --dataset={_DATASET.value}; leave it out")
    from jaxrd.data import preparation
    from jaxrd.data.opening import open_split
    say = functools.partial(print, flush=True)  # a file or pipe would get the lines in the end
    if what is _NPZ:
        preparation.check_name(_NAME.value)
        splits = zip(_SPLITS[len(_NPZ.value)], _NPZ.value)
        sources = {split: open_split(_suffixed(path.strip()), split) for split, path in splits}
        arrays = {split: (source.images, source.labels) for split, source in sources.items()}
        paths = tuple(source.name for source in sources.values())
        preparation.prepare_arrays(_NAME.value, arrays, directory, say, paths=paths)
    elif what is _FOLDER:
        preparation.prepare_folder(_NAME.value, _FOLDER.value, directory, _IMAGE_SIZE.value, say)
    elif _IMAGE_SIZE.value and _SOURCE.value:
        preparation.prepare_tiny_imagenet(_SOURCE.value, directory, _IMAGE_SIZE.value, say)
    else:
        preparation.prepare_catalogue(_DATASET.value, directory, _SOURCE.value or None, say)


def _suffixed(path: str) -> str:
    if not path.endswith(".npz"):
        raise InputError(f"--npz={','.join(_NPZ.value)}: {path or 'a name'} must end in .npz")
    return path


if __name__ == "__main__":
    command.run(main)
