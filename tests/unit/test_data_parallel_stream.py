"""In runs with CUDA graphs gradients do not end on the default stream, which no capture can include."""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from megads.config.loader import load_config
from megads.config.resolve import resolve
from megads.optim import build
from tests.dist import tiny


class Streams:
    """`torch.cuda`'s, by name; `waits` are pairs of the one that waits and the one that it waits for."""

    def __init__(self) -> None:
        self.current, self.waits = self.stream("default"), list[tuple[str, str]]()

    def stream(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name=name, wait_stream=lambda other: self.waits.append((name, other.name)))

    @contextlib.contextmanager
    def on(self, stream: SimpleNamespace) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before


@pytest.mark.parametrize("parts", [[], ["attn"]])
def test_data_parallelism_is_built_on_a_side_stream_for_graphs_only(
    parts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    streams, built_on, warnings = Streams(), [], []
    monkeypatch.setattr(torch.cuda, "Stream", lambda: streams.stream("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams.current)
    monkeypatch.setattr(torch.cuda, "stream", streams.on)
    monkeypatch.setattr(
        build, "DistributedDataParallel", lambda *args, **kwargs: built_on.append(streams.current.name)
    )
    monkeypatch.setattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", warnings.append)
    settings = {"training.cuda_graphs": parts, "distributed.device": "cuda", "model.backend": "native"}
    config = load_config(None, tiny.BASE | settings | {"training.use_bf16": True})
    chunk = torch.nn.Module()
    chunk.config = SimpleNamespace()  # type: ignore[assignment]
    build.wrap_data_parallel(config, resolve(config, 1, cuda=True), [chunk])
    assert built_on == (["side"] if parts else ["default"])
    assert streams.waits == ([("side", "default"), ("default", "side")] if parts else [])
    assert warnings == ([False] if parts else [])
    assert streams.current.name == "default"
