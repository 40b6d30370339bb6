"""Tiny-ImageNet from stand-ins for the official archive: 3 classes of 5 images, 6 validation images."""

import io
import json
import os
import pathlib
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from jaxrd.data import image_files, open_dataset, preparation, tfds_reader, tiny_imagenet
from tests.support import assert_input_error

ROOT = pathlib.Path(__file__).parents[2]
CLASSES = ["n01443537", "n01629819", "n02056570"]
SIZES = {"classes": 3, "train": 15, "test": 6}


def jpeg(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "jpeg", quality=90)
    return file.getvalue()


def pixels_of(content):
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(tiny_imagenet, "SIZES", SIZES)


@pytest.fixture
def official():
    """{path in the archive: content}, in the order and with the extras of the official one."""
    generator, files = np.random.default_rng(0), {"wnids.txt": "\n".join(reversed(CLASSES)).encode(), "words.txt": b""}
    for name in reversed(CLASSES):
        files[f"train/{name}/{name}_boxes.txt"] = b"x\t0\t0\t1\t1\n"
        for index in (10, 0, 2, 1, 3):
            shape = (64, 64) if index == 2 else (64, 64, 3)  # some of the official images are grey
            files[f"train/{name}/images/{name}_{index}.JPEG"] = jpeg(generator.integers(0, 256, shape, dtype=np.uint8))
    rows = []
    for index in range(6):
        files[f"val/images/val_{index}.JPEG"] = jpeg(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8))
        rows.append(f"val_{index}.JPEG\t{CLASSES[(index * 2 + 1) % 3]}\t0\t32\t44\t62\n")
    files["val/val_annotations.txt"] = "".join(rows).encode()
    files["test/images/test_0.JPEG"] = b"without a label, and never looked at"
    return files


def pack(path, files, prefix="tiny-imagenet-200/"):
    with zipfile.ZipFile(path, "w") as archive:
        archive.mkdir(prefix.rstrip("/")) if prefix else None
        for name, content in files.items():
            archive.writestr(prefix + name, content)
    return path


def unpack(path, files):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def prepare(source, directory, **options):
    lines = []
    path = preparation.prepare_tiny_imagenet(source, directory, say=lines.append, **options)
    return path, lines


def expected(files):
    train = sorted(path for path in files if path.startswith("train/") and path.endswith(".JPEG"))
    return {"train": (np.stack([pixels_of(files[path]) for path in train]),
                      np.array([CLASSES.index(path.split("/")[1]) for path in train])),
            "test": (np.stack([pixels_of(files[f"val/images/val_{index}.JPEG"]) for index in range(6)]),
                     np.array([(index * 2 + 1) % 3 for index in range(6)]))}


@pytest.mark.parametrize("form", ["zip", "folder", "folder of the zip", "folder of the folder", "zip without its folder"])
def test_the_official_layout_is_read_from_archive_and_folder(tmp_path, official, form):
    source = tmp_path / "source"
    source.mkdir()
    if "zip" in form:
        archive = pack(source / "tiny-imagenet-200.zip", official, "" if "without" in form else "tiny-imagenet-200/")
    else:
        unpack(source / "tiny-imagenet-200", official)
    place = {"zip": "tiny-imagenet-200.zip", "folder": "tiny-imagenet-200", "zip without its folder": "tiny-imagenet-200.zip"}
    path, _ = prepare(source / place.get(form, "."), tmp_path / "data")
    found = tfds_reader.find("tiny_imagenet", tmp_path / "data")
    assert found.path == path and found.image_shape == (64, 64, 3) and found.classes == 3
    assert found.splits == {"train": 15, "test": 6}
    for split, (images, labels) in expected(official).items():
        there = found.read(split)
        assert (there[0] == images).all() and (there[1] == labels).all()
    assert (path / "label.labels.txt").read_text().split() == CLASSES
    assert len(open_dataset("tiny_imagenet", directory=tmp_path / "data", validation_fraction=0.2).train) == 12
    if "zip" in form:  # another place for the same files
        _, lines = prepare(unpack(tmp_path / "elsewhere", official), tmp_path / "data")
        assert "prepared already" in lines[0] and archive.exists()


def test_images_can_be_resized(tmp_path, official):
    source = pack(tmp_path / "tiny-imagenet-200.zip", official)
    prepare(source, tmp_path / "data", image_size=32)
    found = tfds_reader.find("tiny_imagenet", tmp_path / "data")
    wanted = np.asarray(Image.fromarray(expected(official)["test"][0][3]).resize((32, 32), Image.Resampling.BICUBIC))
    assert found.image_shape == (32, 32, 3) and (found.read("test")[0][3] == wanted).all()
    assert_input_error(lambda: prepare(source, tmp_path / "data"), "tiny-imagenet-200.zip", "delete that directory")


def test_the_registered_builder_describes_the_official_data_set():
    builder = tfds.builder("tiny_imagenet", data_dir="/nowhere", file_format="array_record")
    assert builder.info.features["image"].shape == (64, 64, 3) and builder.info.features["label"].num_classes == 200
    assert str(builder.version) == tiny_imagenet.TinyImagenet.VERSION


def _drop(path):
    return lambda files: files.pop(path)


def _annotate(line):
    def change(files):
        files["val/val_annotations.txt"] += line
    return change


DAMAGES = {
    "a train image is missing": (_drop(f"train/{CLASSES[0]}/images/{CLASSES[0]}_0.JPEG"), ["14 train", "3, 15 and 6"]),
    "a class is missing": (lambda files: [files.pop(path) for path in list(files) if CLASSES[2] in path], [CLASSES[2], "http"]),
    "a test image is missing": (_drop("val/images/val_3.JPEG"), ["val_3.JPEG", "http"]),
    "no annotations": (_drop("val/val_annotations.txt"), ["val/val_annotations.txt", "http"]),
    "an unknown class": (_annotate(b"val_0.JPEG\tn00000000\t0\t0\t1\t1\n"), ["n00000000"]),
    "half a line": (_annotate(b"val_0.JPEG"), ["val_annotations.txt"]),
    "an annotation too many": (_annotate(b"val_0.JPEG\tn01443537\t0\t0\t1\t1\n"), ["7 validation"]),
    "a damaged image": (lambda files: files.update({"val/images/val_2.JPEG": b"\xff\xd8nothing"}), ["val_2.JPEG", "as an im"]),
    "an image of another size": (lambda files: files.update({"val/images/val_2.JPEG": jpeg(np.zeros((32, 32), np.uint8))}),
                                 ["val_2.JPEG is 32x32", "--image_size"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("form", ["zip", "folder"])
def test_an_incomplete_source_is_one_line_and_leaves_nothing(tmp_path, official, damage, form):
    change, mentions = DAMAGES[damage]
    change(official)
    source = pack(tmp_path / "x.zip", official) if form == "zip" else unpack(tmp_path / "x", official)
    assert_input_error(lambda: prepare(source, tmp_path / "data"), str(source), *mentions)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "no zip", "a changed byte"])
def test_a_damaged_archive_is_one_line_and_leaves_nothing(tmp_path, official, damage):
    source = pack(tmp_path / "tiny-imagenet-200.zip", official)
    content = source.read_bytes()
    if damage == "missing":
        source.unlink()
    elif damage == "a changed byte":  # in an image: its checksum tells
        place = content.index(official["val/images/val_2.JPEG"]) + 500
        source.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1:])
    else:
        source.write_bytes({"empty": b"", "cut": content[:len(content) // 2], "no zip": b"x" * 1000}[damage])
    assert_input_error(lambda: prepare(source, tmp_path / "data"), str(source))
    assert not (tmp_path / "data").exists()


def test_after_a_kill_only_the_rest_is_decoded(tmp_path, official, monkeypatch):
    source = pack(tmp_path / "tiny-imagenet-200.zip", official)
    code = """
import os, sys
from jaxrd.data import image_files, preparation, tiny_imagenet
tiny_imagenet.SIZES = {"classes": 3, "train": 15, "test": 6}
image_files.CHUNK, decode = 4, image_files._decode
image_files._decode = lambda sources, path, *rest, **options: os._exit(9) if path.startswith("val") else decode(
    sources, path, *rest, **options)
preparation.prepare_tiny_imagenet(*sys.argv[1:], say=lambda line: None)
"""
    process = subprocess.run([sys.executable, "-c", code, str(source), str(tmp_path / "data")], cwd=ROOT, timeout=120)
    assert process.returncode == 9
    monkeypatch.setattr(image_files, "CHUNK", 4)
    decoded, decode = [], image_files._decode
    monkeypatch.setattr(image_files, "_decode", lambda sources, path, *rest, **options: (
        decoded.append(path), decode(sources, path, *rest, **options))[1])
    path, lines = prepare(source, tmp_path / "data")
    assert "goes on after 15 of 21 images" in lines[0] and len(decoded) == 6
    images, _ = tfds_reader.find("tiny_imagenet", tmp_path / "data").read("train")
    assert (images == expected(official)["train"][0]).all()
    assert os.listdir(tmp_path / "data") == ["tiny_imagenet"]
    assert json.loads((path / "jaxrd.json").read_text())["origin"]["paths"] == [str(source)]
