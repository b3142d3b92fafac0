"""Flash kernels without a GPU: what they are handed, with plain torch in their place, and which is chosen."""

import contextlib
import inspect
import logging
from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from megads.config.loader import load_config
from megads.config.resolve import resolve
from megads.errors import EnvironmentSetupError
from megads.model import flash_attention, packed_sequences
from megads.model.attention import CoreAttention, dense_attention
from megads.model.flash_attention import Case, choose_core_attention, find_kernel
from megads.model.packed_sequences import pack

BATCH, HEADS, LENGTH, WIDTH, V_WIDTH, SCALE = 2, 3, 12, 10, 6, 0.3
V3 = Case(
    transformer_engine=True,
    dtype=torch.bfloat16,
    heads=128,
    qk_width=192,
    v_width=128,
    queries=4096,
    keys=4096,
    documents=False,
    window=None,
)


def documents_of(batch: int) -> Tensor:
    """Of different lengths in each row; one ends where the third quarter of the sequence begins."""
    rows = [[0, 0, 1, 1, 1, 1, 2, 2, 2, 3, 3, 3], [0, 0, 0, 0, 0, 0, 0, 1, 2, 2, 2, 2]]
    return torch.tensor(rows, dtype=torch.int32)[:batch]


def sequences(
    q_TNX: Tensor, k_TNX: Tensor, v_TNX: Tensor, query_ends: Tensor, key_ends: Tensor, scale: float, left: int
) -> Tensor:
    """What a kernel for sequences side by side computes: each alone, its queries ending with its keys."""
    outputs = []
    for row in range(len(query_ends) - 1):
        q = q_TNX[query_ends[row] : query_ends[row + 1]].transpose(0, 1)
        k, v = (x[key_ends[row] : key_ends[row + 1]].transpose(0, 1) for x in (k_TNX, v_TNX))
        assert 0 < q.shape[1] <= k.shape[1]
        distance = torch.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None] - torch.arange(k.shape[1])
        seen = (distance >= 0) & ((distance <= left) | torch.tensor(left < 0))
        scores = (scale * q @ k.transpose(1, 2)).masked_fill(~seen, -torch.inf)
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


def plain_varlen_attn(
    q: Tensor, k: Tensor, v: Tensor, query_ends: Tensor, key_ends: Tensor, longest_query: int,
    longest_key: int, *, scale: float, window_size: tuple[int, int],
) -> Tensor:  # fmt: skip
    assert q.shape[-1] == k.shape[-1] == v.shape[-1]
    assert q.shape[-1] % 8 == 0
    assert query_ends.dtype == key_ends.dtype == torch.int32
    assert longest_query >= query_ends.diff().max()
    assert longest_key >= key_ends.diff().max()
    assert window_size[1] == 0
    return sequences(q, k, v, query_ends, key_ends, scale, window_size[0])


class PlainTransformerEngine:
    """`DotProductAttention` as its documentation describes the two layouts."""

    def __init__(self, heads: int, qk_width: int, v_width: int, scale: float) -> None:
        self.heads, self.widths, self.scale = heads, (qk_width, v_width), scale

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, qkv_format: str, attn_mask_type: str,
        window_size: tuple[int, int], cu_seqlens_q: Tensor | None = None, cu_seqlens_kv: Tensor | None = None,
        max_seqlen_q: int = 0, max_seqlen_kv: int = 0, pad_between_seqs: bool = False,
    ) -> Tensor:  # fmt: skip
        assert (q.shape[-1], v.shape[-1]) == self.widths
        assert window_size[1] == 0
        if qkv_format == "thd":
            assert attn_mask_type.startswith("padding_causal")
            assert cu_seqlens_q is not None
            assert cu_seqlens_kv is not None
            if attn_mask_type == "padding_causal":
                assert cu_seqlens_q.equal(cu_seqlens_kv), "top left is bottom right only where they are equal"
            assert max_seqlen_q >= cu_seqlens_q.diff().max()
            assert max_seqlen_kv >= cu_seqlens_kv.diff().max()
            return sequences(q, k, v, cu_seqlens_q, cu_seqlens_kv, self.scale, window_size[0]).flatten(1)
        assert qkv_format == "sbhd"
        assert attn_mask_type == ("causal" if len(q) == len(k) else "causal_bottom_right")
        rows = [
            sequences(
                q[:, b], k[:, b], v[:, b], torch.tensor([0, len(q)]), torch.tensor([0, len(k)]), self.scale,
                window_size[0],
            )
            for b in range(q.shape[1])
        ]  # fmt: skip
        return torch.stack(rows, dim=1).flatten(2)


@pytest.fixture(params=["torch", "transformer_engine"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> CoreAttention:
    monkeypatch.setattr(flash_attention, "varlen_attn", plain_varlen_attn)
    monkeypatch.setattr(flash_attention, "_te_attention", PlainTransformerEngine)
    return flash_attention._flash_attend if request.param == "torch" else flash_attention._te_attend


def results(attend: CoreAttention, batch: int, first: int, queries: int, **options: Any) -> Iterator[Tensor]:
    """Outputs, and gradients of queries, keys and values."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(queries, WIDTH), (LENGTH, WIDTH), (LENGTH, V_WIDTH)]
    q, k, v = (torch.randn(batch, HEADS, *s, generator=generator).requires_grad_() for s in shapes)
    out = attend(q, k, v, scale=SCALE, first_query=first, **options)
    assert out.shape == (batch, HEADS, queries, V_WIDTH)
    yield out
    yield from torch.autograd.grad((out * torch.arange(V_WIDTH)).sin().sum(), (q, k, v))


@pytest.mark.parametrize("window", [None, 3, 20])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("first", "queries"), [(0, 12), (0, 3), (3, 3), (6, 3), (9, 3)])
@pytest.mark.parametrize("batch", [1, 2])
def test_kernels_are_handed_what_the_dense_kernel_computes(
    kernel: CoreAttention, batch: int, first: int, queries: int, packed: bool, window: int | None
) -> None:
    options = {"window": window, "documents_BK": documents_of(batch) if packed else None}
    found = results(kernel, batch, first, queries, **options)
    expected = results(dense_attention, batch, first, queries, **options)
    for mine, other in zip(found, expected, strict=True):
        assert torch.allclose(mine, other, atol=1e-5)


def test_documents_before_the_queries_are_left_out() -> None:
    found = pack(documents_of(2), 2, 6, 9, torch.device("cpu"))
    assert found.first_keys == (6, 0)
    assert found.query_ends.tolist() == [0, 3, 4, 5, 6]
    assert found.key_ends.tolist() == [0, 3, 10, 11, 12]
    assert (found.longest_query, found.longest_key) == (4, 8), "powers of two, not above the keys"


def test_all_layers_share_one_look_at_the_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    documents, device = documents_of(2), torch.device("cpu")
    look = Mock(side_effect=packed_sequences._packing)
    monkeypatch.setattr(packed_sequences, "_packing", look)
    first = pack(documents, 2, 0, 12, device)
    assert pack(documents.detach(), 2, 0, 12, device) is first, "as recomputation hands it over"
    assert pack(documents, 2, 6, 12, device) is not first
    assert pack(documents.clone(), 2, 0, 12, device) is not first
    assert look.call_count == 3
    documents[1] = 0
    assert pack(documents, 2, 0, 12, device).key_ends.tolist() == [0, 2, 6, 9, 12, 24]


def test_packings_of_finished_micro_batches_are_forgotten() -> None:
    for _ in range(2 * packed_sequences._MOST_PACKINGS):
        pack(documents_of(2), 2, 0, 12, torch.device("cpu"))
    assert len(packed_sequences._packings) == packed_sequences._MOST_PACKINGS


def test_a_gpu_takes_the_first_kernel_that_can_do_all_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    part = Case(**{**vars(V3), "transformer_engine": False, "queries": 1024})
    packed = Case(**{**vars(V3), "transformer_engine": False, "documents": True})
    for case in (part, packed):
        kernel, reasons = find_kernel([case])
        assert kernel is not None
        assert kernel.name == "torch's FlashAttention"
        assert ["model.backend" in reasons[0], "no documents" in reasons[1], len(reasons)] == [True, True, 2]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    kernel, reasons = find_kernel([part, packed])
    assert kernel is None
    assert "Ampere" in reasons[2]


def chosen(settings: dict[str, Any]) -> CoreAttention:
    sources = [{"name": "random", "path": "random"}]
    config = load_config(None, {"data.sources": sources, "distributed.device": "cpu"} | settings)
    return choose_core_attention(config, resolve(config, 1, cuda=False), transformer_engine=False)


def test_the_choice_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    with caplog.at_level(logging.INFO, "megads"):
        assert chosen({}) is dense_attention
        assert not caplog.records
        assert chosen({"model.mla.use_flash_mla": True}) is dense_attention
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "on the CPU" in record.message
    with pytest.raises(EnvironmentSetupError, match=r"on the CPU.*fallback_to_dense"):
        chosen({"model.mla.use_flash_mla": True, "model.mla.fallback_to_dense": False})


def test_a_kernel_is_told_with_those_it_is_preferred_to(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(flash_attention, "flash_attention_problem", lambda config, device: None)
    with caplog.at_level(logging.INFO, "megads"):
        attend = chosen({"model.mla.use_flash_mla": True, "data.document_mask": True})
    assert attend is flash_attention._flash_attend
    (record,) = caplog.records
    assert record.message.startswith("attention: torch's FlashAttention (not Transformer Engine's")
    assert "no documents" in record.message


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("queries", [1024, 4096])
def test_transformer_engine_is_asked_in_its_own_terms(
    monkeypatch: pytest.MonkeyPatch, documents: bool, queries: int
) -> None:
    """Its selection runs up to the question to cuDNN, whose answer is given here."""
    pytest.importorskip("transformer_engine")
    from transformer_engine.pytorch.attention.dot_product_attention import utils

    cudnn = Mock(return_value=(1, ""))
    monkeypatch.setenv("NVTE_UNFUSED_ATTN", "1")
    monkeypatch.setattr(utils, "get_device_compute_capability", lambda: (9, 0))
    monkeypatch.setattr(utils, "get_cudnn_version", lambda: (9, 20, 0))
    monkeypatch.setattr(utils, "_get_fused_attn_backend", cudnn)
    case = Case(**{**vars(V3), "documents": documents, "queries": queries})
    assert flash_attention._te_problem(case) is None
    options = cudnn.call_args.kwargs
    assert (options["head_dim_qk"], options["head_dim_v"], options["max_seqlen_q"]) == (192, 128, queries)
    assert (options["window_size_left"], options["window_size_right"]) == (-1, 0)
    cudnn.return_value = (int(utils.FusedAttnBackend.No_Backend), "a reason")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert "unfused" in str(flash_attention._te_problem(case))


def test_calls_of_transformer_engine_fit_its_signatures(monkeypatch: pytest.MonkeyPatch) -> None:
    te = pytest.importorskip("transformer_engine.pytorch")
    real, calls = te.DotProductAttention, []

    class Recorded(PlainTransformerEngine):
        def __init__(self, heads: int, widths: tuple[int, int], softmax_scale: float) -> None:
            inspect.signature(real.__init__).bind(None, heads, widths, softmax_scale=softmax_scale)
            super().__init__(heads, *widths, softmax_scale)

        def __call__(self, *args: Tensor, **options: Any) -> Tensor:
            calls.append(inspect.signature(real.forward).bind(None, *args, **options))
            return super().__call__(*args, **options)

    inspect.signature(te.autocast).bind(enabled=False)
    monkeypatch.setattr(te, "autocast", lambda enabled: contextlib.nullcontext())  # it wants a GPU even so
    monkeypatch.setattr(te, "DotProductAttention", Recorded)
    flash_attention._te_attention.cache_clear()
    for documents in (None, documents_of(2)):
        list(results(flash_attention._te_attend, 2, 3, 3, documents_BK=documents))
    flash_attention._te_attention.cache_clear()
    assert [call.arguments["qkv_format"] for call in calls] == ["sbhd", "thd"]
    assert [call.arguments["query_layer"].dim() for call in calls] == [4, 3]
