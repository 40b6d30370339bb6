"""Metrics in TensorBoard and W&B: what metrics.jsonl holds, under the same names and steps."""

import sys
import types

import pytest

from jaxrd.config import Config
from jaxrd.errors import InputError
from jaxrd.training import writers


def config(names):
    return Config.from_dict({"training": {"writers": names}})


def test_tensorboard_files_hold_what_was_written(tmp_path):
    pytest.importorskip("tensorboardX", reason="the extra tensorboard is not installed")
    from tensorboardX.proto import event_pb2

    writer, = writers.open_writers(tmp_path, config("tensorboard"), resumed_at=0)
    writer.write(50, {"train/loss": 1.25})
    writer.close()
    values = {}
    for path in (tmp_path / "tensorboard").iterdir():
        raw = path.read_bytes()
        while raw:  # records: length, checksum, event, checksum
            size = int.from_bytes(raw[:8], "little")
            event = event_pb2.Event.FromString(raw[12:12 + size])
            values |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            raw = raw[16 + size:]
    assert values == {("train/loss", 50): 1.25}


def test_wandb_run_is_continued_by_the_same_directory(tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("end"))
    inits = []
    fake = types.SimpleNamespace(init=lambda **options: inits.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for _ in range(2):
        writer, = writers.open_writers(tmp_path, config("wandb"), resumed_at=0)
        writer.write(7, {"train/loss": 0.5})
        writer.close()
    assert calls == [(7, {"train/loss": 0.5}), "end"] * 2
    assert inits[0]["id"] == inits[1]["id"] and inits[0]["resume"] == "allow"
    assert inits[0]["config"] == config("wandb").to_dict()


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_names_its_extra(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, {"tensorboard": "tensorboardX", "wandb": "wandb"}[name], None)
    with pytest.raises(InputError, match=f"names {name}, .* pip install"):
        writers.open_writers(tmp_path, config(name), resumed_at=0)


def test_an_unknown_writer_is_named():
    with pytest.raises(InputError, match="config.training.writers is 'tensorboard,clearml'"):
        config("tensorboard,clearml")
