"""The configurations of the four published data sets, end to end on data that `tfds.testing.mock_data` makes up."""

import pytest
import tensorflow_datasets as tfds

from configs import cifar10, cifar100, svhn, tiny_imagenet
from jaxrd.config import Config
from jaxrd.errors import InputError
from jaxrd.training import loop, opening
from jaxrd.training.log import read_metrics

pytestmark = pytest.mark.usefixtures("quick_compilation")

SMALL = {"student": "resnet6_w4", "training": {"steps": 2, "batch_size": 8, "log_every": 1, "checkpoint_every": 2},
         "attack": {"steps": 1}}
FILES = {"cifar10": cifar10, "cifar100": cifar100, "svhn": svhn, "tiny_imagenet": tiny_imagenet}


def small(values, **overrides):
    """The configuration with a small network, batch, attack and length: all else as published."""
    for name, value in (SMALL | overrides).items():
        values[name] = {**values[name], **value} if isinstance(value, dict) else value
    return Config.from_dict(values)


@pytest.mark.parametrize("name", FILES)
def test_every_catalogue_config_trains_without_preparation_under_mock_data(name, tmp_path):
    file = FILES[name]
    shape = (64, 64, 3) if name == "tiny_imagenet" else (32, 32, 3)
    classes = {"cifar100": 100, "tiny_imagenet": 200}.get(name, 10)
    with tfds.testing.mock_data(num_examples=96):
        teacher = small(file.get_config("teacher").to_dict())
        state = loop.train(teacher, tmp_path / "teacher")
        assert int(state.step) == 2
        dataset, source = opening.open_data(teacher)
        assert source.image_shape == shape and source.classes == classes
        assert len(source) == 94 and len(dataset.validation) == 2 and len(dataset.test) == 96
        student = small(file.get_config("rslad+igdm").to_dict(), teacher=str(tmp_path / "teacher"))
        assert (student.data.shift, student.data.flip) == (4, True)
        assert int(loop.train(student, tmp_path / "student").step) == 2
    assert [entry["step"] for entry in read_metrics(tmp_path / "student" / "metrics.jsonl") if "train/loss" in entry] == [1, 2]


@pytest.mark.parametrize("name", FILES)
def test_without_the_mock_they_say_how_to_prepare_the_data(name, tmp_path):
    config = small(FILES[name].get_config("teacher").to_dict(), data={"directory": str(tmp_path / "none")})
    with pytest.raises(InputError) as caught:
        loop.train(config, tmp_path / "run")
    assert f"python -m launch.prepare --dataset={config.data.name}" in str(caught.value)
    assert not (tmp_path / "run").exists() and not (tmp_path / "none").exists()
