"""Files that PyTorch itself writes and reads, through a run directory."""

import numpy as np
import pytest

from jaxrd import models
from jaxrd.training import exchange

torch = pytest.importorskip("torch", reason="parity with PyTorch needs torch, which jaxrd does not")

from tests.models import torch_modules  # needs torch


@pytest.fixture
def module():
    torch.manual_seed(0)
    module = torch_modules.WideResNet(depth=10, width=1, classes=10, sub_block1=True)
    for layer in module.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(layer.running_var, 0.5, 1.5)
            torch.nn.init.normal_(layer.running_mean)
            layer.num_batches_tracked += 17
    return module.eval()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("parallel", [False, True], ids=["plain", "DataParallel"])
def test_a_checkpoint_comes_back_to_torch_bit_for_bit(module, tmp_path, legacy, parallel):
    saved = torch.nn.DataParallel(module) if parallel else module
    optimizer = torch.optim.SGD(saved.parameters(), 0.1, momentum=0.9)
    images = np.random.default_rng(0).uniform(size=(3, 32, 32, 3)).astype(np.float32)
    points = torch.tensor(images.transpose(0, 3, 1, 2).copy())
    torch.save({"state_dict": saved.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3},
               tmp_path / "in.pt", _use_new_zipfile_serialization=not legacy)
    exchange.import_weights(tmp_path / "in.pt", tmp_path / "run", "wrn10_1", say=lambda _: None)
    exchange.export_weights(tmp_path / "run", tmp_path / "out.pt", "torch", say=lambda _: None)

    state = torch.load(tmp_path / "out.pt", weights_only=True)
    expected = {key: value for key, value in module.state_dict().items() if not key.startswith("sub_block1.")}
    assert list(state) == list(expected)
    assert all(state[key].dtype == expected[key].dtype and torch.equal(state[key], expected[key]) for key in expected)
    exchange.export_weights(tmp_path / "run", tmp_path / "dead.pt", "torch", sub_block1=True, say=lambda _: None)
    whole = torch_modules.WideResNet(depth=10, width=1, classes=10, sub_block1=True)
    with_dead = torch.load(tmp_path / "dead.pt", weights_only=True)
    assert list(with_dead) == list(whole.state_dict())
    whole.load_state_dict(with_dead, strict=True)
    alone = torch_modules.WideResNet(depth=10, width=1, classes=10)
    alone.load_state_dict(state, strict=True)
    logits_fn = models.logits_fn(*models.restore(tmp_path / "run"))
    with torch.no_grad():
        reference = module(points)
        assert torch.equal(alone.eval()(points), reference), "the dead block changes nothing"
        assert torch.equal(whole.eval()(points), reference)
    np.testing.assert_allclose(logits_fn(images), reference.numpy(), rtol=0, atol=1e-4)
