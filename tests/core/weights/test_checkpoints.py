import json

import pytest
import torch

from core import vit
from core.errors import InputError
from core.weights import checkpoints


def test_what_does_not_fit_is_named(config):
    params = vit.init(config, 0)
    lacking = {n: p for n, p in params.items() if n != "norm.bias"}
    with pytest.raises(InputError, match=r"lack norm\.bias"):
        checkpoints.check(lacking, config)
    with pytest.raises(InputError, match="have the unknown extra"):
        checkpoints.check(params | {"extra": torch.zeros(1)}, config)
    with pytest.raises(InputError, match=r"head.weight has shape \(7, 16\), the model needs \(5, 16\)"):
        checkpoints.check(params | {"head.weight": torch.zeros(7, 16)}, config)


def test_checkpoint_round_trip(config, tmp_path):
    params = vit.init(config, 0)
    checkpoints.save(tmp_path / "a.safetensors", params, {"arm": "flash", "n": 3})
    loaded, about = checkpoints.load(tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").write_bytes(bytes((tmp_path / "a.safetensors").stat().st_size))  # in place, after it
    assert about == {"arm": "flash", "n": 3}
    assert all(torch.equal(loaded[n], params[n]) for n in params)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_bad_checkpoints_are_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        checkpoints.load(tmp_path / "none.safetensors")
    (tmp_path / "b.safetensors").write_text(json.dumps({}))
    with pytest.raises(InputError, match="is not a safetensors file"):
        checkpoints.load(tmp_path / "b.safetensors")
