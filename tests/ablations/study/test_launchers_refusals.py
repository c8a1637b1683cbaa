"""What a launcher refuses before it sends anything."""

import socket

import pytest
from ordered import order

from ablations.commands import options
from ablations.study import launchers
from ablations.study.recipes import Recipe
from core.errors import InputError


def test_a_package_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(launchers, "find_spec", lambda name: None)
    for name, package in (("ray", "ray"), ("slurm", "submitit")):
        with pytest.raises(InputError, match=rf"package {package}: pip install 'vit-ablations\[{name}\]'"):
            launchers.launched(name, order(tmp_path), "", ())


def test_a_device_must_be_named(tmp_path, monkeypatch):
    monkeypatch.setattr(launchers, "find_spec", lambda name: True)
    with pytest.raises(InputError, match="pass --device cuda or --device cpu"):
        launchers.launched("ray", order(tmp_path, recipe=Recipe()), "", ())


def test_an_address_that_nobody_answers():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound, and not listened at
        port = free.getsockname()[1]
        with pytest.raises(InputError, match=rf"nobody answers at --ray-address 127.0.0.1:{port}"):
            launchers._answers(f"127.0.0.1:{port}")
    with pytest.raises(InputError, match="nobody answers at --ray-address ää"):
        launchers._answers("ä" * 300 + ":1")
    for address in ("127.0.0.1", "here:now", ":6379"):
        with pytest.raises(InputError, match="is no HOST:PORT"):
            launchers._answers(address)


def test_machines_that_are_too_small():
    launchers._fits({"num_cpus": 4, "num_gpus": 1}, [{"CPU": 2}, {"CPU": 8.0, "GPU": 1.0}])
    with pytest.raises(InputError, match="takes 4 CPUs and 1 GPUs, and the cluster's machines have 2 CPUs and 0 GPUs"):
        launchers._fits({"num_cpus": 4, "num_gpus": 1}, [{"CPU": 2}])


def test_slurm_is_not_here_or_refuses_a_setting(tmp_path, monkeypatch):
    pytest.importorskip("submitit", reason="the extra slurm is not installed")
    for missing in ("sbatch", "srun"):
        monkeypatch.setattr(launchers.shutil, "which", lambda name, missing=missing: None if name == missing else name)
        with (
            pytest.raises(InputError, match=rf"no Slurm here \({missing} is not found"),
            launchers.launched("slurm", order(tmp_path / "study"), "", ["partition=gpu"]),
        ):
            pass
    with (
        pytest.raises(InputError, match="--slurm colour=red: .*colour"),
        launchers.launched("slurm", order(tmp_path / "study"), "", ["cluster=local", "colour=red"]),
    ):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["partition"], "--slurm 'partition' is no NAME=VALUE; write for example partition=gpu"),
        (["cluster="], "--slurm 'cluster=' is no NAME=VALUE"),
        (["=gpu"], "--slurm '=gpu' is no NAME=VALUE"),
        (["--wrap=x"], "--slurm '--wrap=x' is no NAME=VALUE"),
        (["partition=a", "time=3", "partition=b"], "--slurm has partition twice; write it once"),
        (["array_parallelism=1" + 30 * "0"], "--slurm array_parallelism=10+ is too large a number"),
        (["time=4:00:00"], "--slurm time=4:00:00 is no number of minutes; write time=240"),
        (["time=0"], "--slurm time=0 is no number of minutes"),
        (["time=-5"], "--slurm time=-5 is no number of minutes"),
        (["cluster=locl"], "unknown --slurm cluster 'locl'; legal: slurm, local, debug; did you mean 'local'"),
    ],
)
def test_settings_of_slurm_that_are_none(words, message):
    with pytest.raises(InputError, match=message):
        options.checked(options.Command(launcher="slurm", slurm=tuple(words)))


def test_settings_of_slurm_are_read_as_they_are_written():
    read = launchers.read_settings(["mem=32GB", "account=007", "array_parallelism=8"])
    assert read == {"mem": "32GB", "account": "007", "array_parallelism": 8, "time": launchers.HOUR}
