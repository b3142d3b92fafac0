"""A whole `TrainingStep` on one process against the oracle: what `transformers` does not have.

MTP, every auxiliary loss in value and gradient, masks, documents, dropping, balancing biases: losses token
by token, the gradient of the whole objective for each parameter, loads and biases after the step.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from megads.config.loader import load_config
from megads.config.schema import Config
from megads.model.hf_names import from_huggingface, to_huggingface
from megads.model.reference import Losses, ReferenceModel
from tests.dist import tiny
from tests.dist.harness import run_distributed
from tests.numerics.test_reference_transformers import randomize, stack_experts

TOKEN_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-4
ROUTERS = 5  # three MoE layers of the decoder, two of MTP
MASKS = {"data.document_mask": True, "data.reset_position_ids": True}
SOFTMAX = {"model.moe.scoring_func": "softmax", "model.moe.norm_topk_prob": False}


def weighted(loss_type: str, **others: Any) -> dict[str, Any]:
    """A balance loss that weighs as much as the main one."""
    return {
        "model.moe.balance_loss_type": loss_type, "model.moe.router_aux_loss_weight": 0.5, **others,
    }  # fmt: skip


CASES: dict[str, dict[str, Any]] = {
    "mtp-depth-2": {},
    "mtp-depth-1": {"training.num_predict_tokens": 2, "training.mtp_loss_weight": 1.0},
    "no-mtp": {"training.use_mtp": False},
    "tied": {"model.tie_word_embeddings": True},
    "sequence": weighted("sequence"),
    "sequence-softmax": weighted("sequence", **SOFTMAX),
    "load": weighted("load"),
    "load-softmax": weighted("load", **SOFTMAX),
    "entropy": weighted("entropy"),
    "entropy-softmax": weighted("entropy", **SOFTMAX),
    "none": weighted("none"),
    "z": {"model.moe.router_z_loss_weight": 0.3},
    "one-sequence-per-micro-batch": weighted("sequence", **{"training.micro_batch_size": 1}),
    "temperature": weighted("sequence", **{"model.moe.router_temperature": 0.6}),
    "capacity": weighted(
        "sequence", **{"model.moe.capacity_factor": 0.7, "model.moe.min_expert_capacity": 0}
    ),
    "no-groups-no-bias": {
        "model.moe.n_group": 1, "model.moe.use_aux_loss_free": False, "model.moe.num_shared_experts": 0,
    },
    "masked": {},
    "documents": MASKS,
    "documents-and-window": MASKS | {"model.mla.sliding_window": 3},
    "window-layernorm": {
        "model.mla.sliding_window": 4, "model.norm_type": "layernorm", "model.mla.q_lora_rank": None,
    },
    "yarn": {
        "model.mla.rope_scaling": {"factor": 8.0, "original_max_position_embeddings": 8},
        "training.gradient_checkpointing": "selective",
    },
    "recomputed": weighted("sequence", **{"training.gradient_checkpointing": "full"}),
    "dense": {
        "model.moe.num_experts": 0, "model.moe.num_shared_experts": 0, "model.intermediate_size": 40,
        "model.first_k_dense_replace": None,
    },
}  # fmt: skip


def batch_of(case: str) -> dict[str, Tensor]:
    return tiny.global_batch(3, masked=case in ("masked", "documents"), documents="documents" in case)


def build_config(case: str) -> Config:
    return load_config(None, tiny.BASE | CASES[case])


# --- in a worker ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """One step of one case: losses [K, B, S], gradients, biases by published names, statistics [L, ...]."""

    token_losses: Tensor
    loss_sums: Tensor
    token_counts: Tensor
    gradients: dict[str, Tensor]
    grad_norm: float
    loads: Tensor
    balance_losses: Tensor
    biases: dict[str, Tensor]


def measure(cases: dict[str, dict[str, Tensor]]) -> dict[str, Measured]:
    """One step per case from the given published weights, with a learning rate of 0 and no clipping."""
    return {case: one_step(case, published) for case, published in cases.items()}


def one_step(case: str, published: dict[str, Tensor]) -> Measured:
    from megads.model.build import unwrap

    step = tiny.start(CASES[case] | {"training.grad_clip": 1e9})
    model, config = unwrap(step.chunks[0]), step.config
    model.load_state_dict(from_huggingface(published, config), strict=True)
    step.optimizer.reload_model_params()
    batches = tiny.micro_batches(step, batch_of(case))
    step.chunks[0].train()
    with torch.no_grad():
        token_losses = [run_forward(step, micro_batch) for micro_batch in batches]
    result = step.train(iter(batches), len(batches), tiny.scalars(step, learning_rate=0.0))
    after = to_huggingface(model.state_dict(), config)
    gradients = model.state_dict() | {name: p.main_grad for name, p in model.named_parameters()}
    return Measured(
        token_losses=torch.cat(token_losses, dim=1),
        loss_sums=result.loss_sums,
        token_counts=result.token_counts,
        gradients={k: v.clone() for k, v in to_huggingface(gradients, config).items() if not is_bias(k)},
        grad_norm=result.grad_norm,
        loads=result.loads,
        balance_losses=result.balance_losses,
        biases={name: tensor for name, tensor in after.items() if is_bias(name)},
    )


def is_bias(name: str) -> bool:
    return "e_score_correction_bias" in name


def run_forward(step: Any, batch: dict[str, Tensor]) -> Tensor:
    data = step.config.data
    positions = batch["position_ids"] if data.reset_position_ids else torch.arange(tiny.SEQ_LENGTH)[None]
    documents = batch["document_ids"] if data.document_mask else None
    return step.chunks[0](batch["tokens"], batch["labels"], positions, documents)


# --- with the worker's results ----------------------------------------------------------------


@pytest.fixture(scope="module")
def references() -> dict[str, ReferenceModel]:
    models = {}
    for case in CASES:
        torch.manual_seed(11)
        models[case] = ReferenceModel(build_config(case))
        randomize(models[case])
    return models


@pytest.fixture(scope="module")
def measured(references: dict[str, ReferenceModel]) -> dict[str, Measured]:
    cases = {
        case: {name: tensor.detach() for name, tensor in model.state_dict().items()}
        for case, model in references.items()
    }
    (found,) = run_distributed(1, measure, cases=cases)
    return found


def reference_losses(model: ReferenceModel, case: str) -> list[Losses]:
    """The oracle's losses of each micro-batch."""
    data, size = model.config.data, model.config.training.micro_batch_size
    parts = {name: tensor.split(size) for name, tensor in batch_of(case).items()}
    return [
        model.loss(
            parts["tokens"][i],
            parts["labels"][i],
            parts["loss_mask"][i],
            parts["position_ids"][i] if data.reset_position_ids else None,
            parts["document_ids"][i] if data.document_mask else None,
        )
        for i in range(len(parts["tokens"]))
    ]


def objective(model: ReferenceModel, losses: list[Losses], tokens: Tensor) -> Tensor:
    """The objective over all micro-batches, `tokens` T in all: what the gradients are of.

    A micro-batch weighs by its tokens; those of auxiliary losses are all tokens, also the masked ones.
    """
    moe, weight = model.config.model.moe, model.config.training.mtp_loss_weight
    total = torch.zeros(())
    for one in losses:
        total = total + one.lm_BS.sum()
        if one.mtp_BS:
            total = total + weight * torch.stack([loss_BS.sum() for loss_BS in one.mtp_BS]).mean()
        auxiliary = moe.router_aux_loss_weight * one.balance + moe.router_z_loss_weight * one.z
        total = total + auxiliary * one.lm_BS.numel()
    return total / tokens


def assert_gradients(found: dict[str, Tensor], model: ReferenceModel, grad_norm: float) -> None:
    expected = stack_experts({name: p.grad for name, p in model.named_parameters()})
    found = stack_experts({name: found[name] for name, _ in model.named_parameters()})
    for name, gradient in expected.items():
        assert gradient.norm() > 0, f"the test does not reach {name}"
        error = ((found[name] - gradient).norm() / gradient.norm()).item()
        assert error < GRADIENT_TOLERANCE, f"{name}: relative error {error:.1e}"
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm().item()
    assert grad_norm == pytest.approx(norm, rel=GRADIENT_TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_a_training_step_equals_the_reference(
    case: str, references: dict[str, ReferenceModel], measured: dict[str, Measured]
) -> None:
    model, found = references[case], measured[case]
    batch = batch_of(case)
    losses = reference_losses(model, case)

    masks = [batch["loss_mask"]]
    by_depth = [torch.cat([one.lm_BS for one in losses])]
    for depth in range(model.shape.mtp_depth):
        masks.append(torch.nn.functional.pad(masks[-1][:, 1:], (0, 1)))
        by_depth.append(torch.cat([one.mtp_BS[depth] for one in losses]))
    token_losses, mask = torch.stack(by_depth), torch.stack(masks)
    torch.testing.assert_close(found.token_losses * mask, token_losses, atol=TOKEN_TOLERANCE, rtol=0)
    torch.testing.assert_close(found.loss_sums.float(), token_losses.sum((1, 2)))
    assert torch.equal(found.token_counts.float(), mask.sum((1, 2)))

    total = objective(model, losses, batch["loss_mask"].sum())
    if bool(batch["loss_mask"].all()):
        assert total.item() == pytest.approx(torch.stack([one.total for one in losses]).mean().item())
    total.backward()
    assert_gradients(found.gradients, model, found.grad_norm)


@pytest.mark.parametrize("case", [case for case in CASES if case != "dense"])
def test_loads_balance_losses_and_biases_equal_the_reference(
    case: str, references: dict[str, ReferenceModel], measured: dict[str, Measured]
) -> None:
    model, found = references[case], measured[case]
    with torch.no_grad():
        losses = reference_losses(model, case)
    routings = list(zip(*(one.output.routings for one in losses), strict=True))
    assert len(routings) == len(found.loads) == 3 + model.shape.mtp_depth
    loads = torch.stack([sum(r.tokens_per_expert_E for r in of_layer) for of_layer in routings])
    assert torch.equal(found.loads, loads.float())
    balance = torch.stack([torch.stack([r.balance_loss for r in of_layer]).mean() for of_layer in routings])
    torch.testing.assert_close(found.balance_losses, balance, atol=1e-5, rtol=1e-5)
    if not model.config.model.moe.use_aux_loss_free:
        assert not found.biases
        return
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if is_bias(name)}
    model.update_biases(list(loads))
    try:
        after = model.state_dict()
        assert found.biases.keys() == before.keys()
        for name, bias in found.biases.items():
            assert not torch.equal(after[name], before[name])
            torch.testing.assert_close(bias, after[name], atol=1e-7, rtol=0)
    finally:
        model.load_state_dict(before, strict=False)


def test_the_cases_exercise_what_they_name(references: dict[str, ReferenceModel]) -> None:
    """Tokens are dropped, masks have holes, documents end inside sequences, windows cut."""
    dropped = reference_losses(references["capacity"], "capacity")[0].output.routings[0]
    assert (dropped.chosen_BSE & (dropped.gates_BSE == 0)).any()
    batch = batch_of("documents")
    assert 0 < batch["loss_mask"].mean() < 1
    assert batch["document_ids"].max() >= 1
    assert batch["position_ids"].max() < 2 * tiny.SEQ_LENGTH
    plain, masked = (
        reference_losses(references[case], "documents")[0].lm_BS for case in ("masked", "documents")
    )
    assert not torch.allclose(plain, masked)
