"""What a run reports is the same in every layout, and a step that reports nothing waits for nothing more."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist import tiny
from tests.dist.harness import run_distributed
from tests.dist.tiny import LAYOUTS

STEPS, LOG_INTERVAL = 4, 2
SOURCES = ("prose", "code", "never")
EOD_ID, FIM_BEGIN_ID = 5, 6
SETTINGS: dict[str, Any] = {
    "training.log_interval": LOG_INTERVAL,
    "logging.tensorboard.enabled": False,
    "logging.expert_load_interval": 1,
}
EXACT = (
    "tokens", "samples", "tokens_per_document", "fim_rate", "max_vio", "max_vio_by_layer", "dead_experts",
    "dead_experts_by_layer", "bias_range", "bias_range_by_layer",
)  # fmt: skip
CLOSE = (
    "lm_loss", "mtp_loss", "mtp_loss_1", "mtp_loss_2", "aux_loss", "loss/prose", "loss/code", "param_norm",
    "router_entropy", "router_entropy_by_layer",
)  # fmt: skip


def batch(index: int) -> dict[str, torch.Tensor]:
    """A global batch with sources, some of whose tokens do not count."""
    sources = torch.tensor([0, 1, 1, 0, 0, 0, 1, 0]).roll(index)
    return tiny.global_batch(index, masked=True) | {"source": sources}


def run(
    settings: dict[str, Any], directory: Path, steps: int = STEPS, seq_length: int = tiny.SEQ_LENGTH
) -> list[dict[str, Any]]:
    """Trains and reports as `Run` does, on batches of our own; what rank 0 wrote."""
    import torch.distributed as dist

    from megads.train.contents import Contents
    from megads.train.reporter import Reporter
    from megads.train.sinks import METRICS_FILE, read_records
    from megads.train.state import TrainState

    config, resolved = tiny.configure(settings | {"output_dir": str(directory)})
    step = tiny.start(settings)
    step.contents = Contents(SOURCES, EOD_ID, FIM_BEGIN_ID)
    state = TrainState()
    reporter = Reporter(config, resolved, step, state)
    scalars = tiny.scalars(step, seq_length=seq_length)
    for index in range(steps):
        parts = tiny.micro_batches(step, batch(index))
        result = step.train(iter(parts) if step.needs_data else None, len(parts), scalars)
        tokens = tiny.GLOBAL_BATCH * tiny.SEQ_LENGTH
        seconds = reporter.step_time(tokens, 1e6)
        state.advance(samples=tiny.GLOBAL_BATCH, tokens=tokens, flops=1e6, seconds=seconds, skipped=False)
        reporter.step_done(result, state)
        if state.step % LOG_INTERVAL == 0:
            sampled = {"prose": 5 * state.step, "code": 3 * state.step}
            reporter.interval(state, scalars, tiny.GLOBAL_BATCH, sampled)
    reporter.close()
    dist.barrier()
    return list(read_records(directory / METRICS_FILE)) if dist.get_rank() == 0 else []


def results(layout: str, settings: dict[str, Any], directory: Path, **options: Any) -> list[dict[str, Any]]:
    processes, of_layout = LAYOUTS[layout]
    settings = SETTINGS | settings | of_layout
    return run_distributed(processes, run, settings=settings, directory=directory, **options)[0]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return results("single", {}, tmp_path_factory.mktemp("single"))


def of_kind(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [record for record in records if record["kind"] == kind]


def test_the_report_that_all_are_compared_with(reference: list[dict[str, Any]]) -> None:
    """Counts of documents and losses by source are those of the batches."""
    records = of_kind(reference, "train")
    assert [record["step"] for record in records] == [2, 4]
    for first, record in zip((0, 2), records, strict=True):
        batches = [batch(index) for index in range(first, first + LOG_INTERVAL)]
        tokens = torch.cat([one["tokens"] for one in batches])
        masks = torch.cat([one["loss_mask"] for one in batches])
        source = torch.cat([one["source"] for one in batches])
        documents = int((tokens == EOD_ID).sum())
        assert record["tokens_per_document"] == tokens.numel() / documents
        assert record["fim_rate"] == int((tokens == FIM_BEGIN_ID).sum()) / documents
        counted = {name: float(masks[source == i].sum()) for i, name in enumerate(SOURCES)}
        assert record["loss/never"] is None
        by_source = sum(record[f"loss/{name}"] * counted[name] for name in ("prose", "code"))
        assert by_source / float(masks.sum()) == pytest.approx(record["lm_loss"], rel=1e-6)
        assert record["loss/prose"] != record["loss/code"]
        depths = [record["mtp_loss_1"], record["mtp_loss_2"]]
        assert min(depths) < record["mtp_loss"] < max(depths)
        assert (record["share/prose"], record["share/code"]) == (0.625, 0.375)
        assert 0 < record["router_entropy"] < 1
        assert record["bias_range"] == max(record["bias_range_by_layer"]) > 0
        seconds = [record[f"seconds/{phase}"] for phase in ("data", "forward_backward", "optimizer")]
        assert min(seconds) > 0
        assert sum(seconds) <= record["step_seconds"]
        assert 0 < record["memory_share"] < 1
    experts = of_kind(reference, "experts")
    assert [record["step"] for record in experts] == [2, 4]
    for record in experts:
        assert len(record["load_by_layer"]) == 5
        assert all(sum(load) == pytest.approx(1, abs=1e-3) for load in record["load_by_layer"])


@pytest.mark.parametrize("layout", ["dp2", "tp2", "pp2", "ep2", "cp2", "etp2", "pp2-vpp2", "tp2-ep2-zero3"])
def test_every_layout_reports_what_one_process_does(
    layout: str, reference: list[dict[str, Any]], tmp_path: Path
) -> None:
    assert_same_report(results(layout, {}, tmp_path), reference)


def test_tied_embeddings_count_once_in_the_norm(tmp_path: Path) -> None:
    """Both ends of the pipeline hold the table."""
    tied = {"model.tie_word_embeddings": True}
    assert_same_report(results("pp2", tied, tmp_path / "two"), results("single", tied, tmp_path / "one"))


def test_short_sequences_keep_their_sources(reference: list[dict[str, Any]], tmp_path: Path) -> None:
    short = results("single", {}, tmp_path, seq_length=tiny.SEQ_LENGTH // 2)
    for record, whole in zip(of_kind(short, "train"), of_kind(reference, "train"), strict=True):
        assert record["loss/never"] is None
        assert record["tokens_per_document"] == whole["tokens_per_document"]
        assert record["loss/code"] == pytest.approx(whole["loss/code"], rel=0.1)


def assert_same_report(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [record["kind"] for record in found] == [record["kind"] for record in expected]
    for mine, other in zip(of_kind(found, "train"), of_kind(expected, "train"), strict=True):
        assert mine.keys() == other.keys()
        assert {name: mine[name] for name in EXACT} == {name: other[name] for name in EXACT}
        for name in CLOSE:
            assert mine[name] == pytest.approx(other[name], rel=1e-5), name
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    assert [r["load_by_layer"] for r in of_kind(found, "experts")] == [
        r["load_by_layer"] for r in of_kind(expected, "experts")
    ]


def norms(settings: dict[str, Any]) -> tuple[float, float]:
    """The reported norm of a model and that of all its parameters, one by one."""
    step = tiny.start(settings)
    squares = sum(
        float(p.detach().double().square().sum()) for chunk in step.chunks for p in chunk.parameters()
    )
    return math.sqrt(float(step.squared_parameter_norm_share())), math.sqrt(squares)


def test_parameter_norm_is_that_of_all_parameters() -> None:
    [(found, expected)] = run_distributed(1, norms, settings={})
    assert found == pytest.approx(expected, rel=1e-6)
