"""Analysis on a local Ray cluster: the values of one process, with a worker killed in the middle."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mixdq_ao import SensitivityError, analyze, calibrate
from mixdq_ao.search.analysis import of_same_model
from mixdq_ao.search.distributed import InProcess, RayWorkers, pool_of
from mixdq_ao.search.fingerprint import fingerprint

PROMPTS = ["one", "two", "three"]


class Two(nn.Module):
    """A linear layer on top of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv, self.linear = nn.Conv2d(3, 4, 1), nn.Linear(12, 12)

    def forward(self, sample: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.linear(self.conv(sample).relu())[:, :3],)


class Pipe:
    """A pipeline of one call. In a process other than this one, call number ``deadly`` kills the process; only once
    where there is a ``mark``, a file that says it happened."""

    def __init__(self, deadly: int = 0, mark: Path | None = None) -> None:
        self.unet, self.mark, self.deadly, self.home, self.calls = Two(), mark, deadly, os.getpid(), 0

    def __call__(self, prompt: list[str], generator: list[torch.Generator], **kwargs: Any) -> SimpleNamespace:
        self.calls += os.getpid() != self.home
        if self.calls and self.calls == self.deadly and not (self.mark is not None and self.mark.exists()):
            if self.mark is not None:
                self.mark.write_text("killed")
            os.kill(os.getpid(), signal.SIGKILL)
        x = torch.stack([torch.randn(3, 12, 12, generator=g) for g in generator])
        return SimpleNamespace(images=self.unet(x)[0].sigmoid())


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """One node of two processors in this machine; stopped afterwards."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install mixdq-ao[ray]")

    pytest.importorskip("ray.cloudpickle").register_pickle_by_value(sys.modules[__name__])
    try:
        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False)
    except Exception as e:  # Ray's own class: it gives a node 30 seconds to start
        if "timed out during startup" not in str(e):
            raise
        ray.shutdown()
        pytest.skip("this machine is too busy: Ray's node did not start within its 30 seconds")
    yield ray
    ray.shutdown()


def options(pipe: Pipe) -> dict[str, Any]:
    calibration = calibrate(pipe, PROMPTS)
    return {"calibration": calibration, "weight_bits": (2, 4), "act_bits": (8,), "batch_size": 2}


def test_a_killed_worker_loses_nothing(cluster, tmp_path):
    pipe = Pipe(deadly=4, mark=tmp_path / "mark")  # two calls are the worker's reference run, then two an evaluation
    settings = options(pipe)
    local = analyze(pipe, PROMPTS, store=tmp_path / "local", **settings)
    far = analyze(pipe, PROMPTS, store=tmp_path / "far", workers=RayWorkers(count=2, cpus=1), **settings)
    assert (tmp_path / "mark").exists() and far.to_json() == local.to_json()
    lines = [sorted((tmp_path / n).read_bytes().splitlines()) for n in ("local", "far")]
    assert lines[0] == lines[1] and len(lines[0]) == 1 + 2 * 3
    assert analyze(pipe, PROMPTS, store=tmp_path / "far", **settings).to_json() == local.to_json()


def test_probes(cluster):
    pipe = Pipe()
    settings = {**options(pipe), "method": "probe", "probes": 6}
    local = analyze(pipe, PROMPTS, **settings)
    assert analyze(pipe, PROMPTS, workers=RayWorkers(count=1), **settings).to_json() == local.to_json()


def test_errors_and_losses(cluster):
    def build(_: Any) -> Any:
        return lambda item: os.kill(os.getpid(), signal.SIGKILL) if item == "die" else 1 // item

    with pool_of(RayWorkers(count=1, losses=0), None, build) as pool:
        with pytest.raises(ZeroDivisionError):
            list(pool.run([1, 0]))
        with pytest.raises(SensitivityError, match="1 workers died, more than losses=0"):
            list(pool.run(["die"]))


def test_one_process_needs_no_ray():
    with pool_of(None, 3, lambda pipe: lambda item: pipe * item) as pool:
        assert isinstance(pool, InProcess) and list(pool.run([1, 2])) == [(1, 3), (2, 6)]


def test_a_worker_with_other_weights_is_refused():
    pipe, other = Pipe(), Pipe()
    build = of_same_model(lambda pipe: pipe, {"a": 1}, fingerprint(pipe.unet, {"a": 1}))
    assert build(pipe) is pipe
    with torch.no_grad():
        other.unet.linear.bias[0] += 1e-3
    with pytest.raises(SensitivityError, match="is not the one that is analyzed"):
        build(other)


def test_without_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SensitivityError, match=r"pip install mixdq-ao\[ray\]"):
        pool_of(RayWorkers(count=1), None, lambda pipe: lambda item: item)


@pytest.mark.parametrize("bad", [{"count": 0}, {"count": True}, {"count": 1, "cpus": -1.0}, {"count": 1, "losses": -1}])
def test_workers_that_cannot_be(bad):
    with pytest.raises(SensitivityError, match="of RayWorkers is"):
        RayWorkers(**bad)
