"""One optimizer step: forward and backward over the micro-batches, update, balancing.

The only file of `train` that calls Megatron-Core's schedules.

The objective is a sum over the tokens of the global batch, divided once by their number:
sum_t [ce_0(t) + lambda / D * sum_k ce_k(t)] / T + auxiliary losses (DeepSeek-V3, eq. 24-25, where every
depth divides by the same T). So neither masks nor layouts change what a token weighs.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.multi_token_prediction import roll_tensor
from torch import Tensor

from megads.config.resolve import Resolved
from megads.config.scalars import Scalars
from megads.config.schema import Config
from megads.model.build import build_model
from megads.model.context_parallel import local_part
from megads.model.cuda_graphs import GraphCapture
from megads.model.fp8_history import advance_histories
from megads.model.language_model import LanguageModel
from megads.model.router import routers_of, update_expert_biases
from megads.optim.build import NonFiniteGradientsError, build_optimizer, set_learning_rate, wrap_data_parallel
from megads.optim.fully_sharded import FullyShardedChunk
from megads.optim.loss_scale import loss_scale, loss_scale_can_fall
from megads.optim.parameter_norm import squared_norm_share
from megads.train.contents import Contents
from megads.train.phases import PhaseClock


@dataclass(frozen=True)
class StepResult:
    """What a step measured; tensors stay on the device until somebody reads them.

    `loss_sums` and `token_counts` [K] are cross-entropy sums and tokens per prediction depth over the
    global batch, the same on every rank; `loss` is the mean of depth 0. `contents` [2, C] are the columns
    of `Contents`. `grad_norm` is None and `applied` False where the gradients were not finite or the step
    was not accepted: nothing was updated. `loss_scale` (FP16 only) is the next step's; `settling` says that
    the update was left out for an overflow which a lower scale may mend. Of this pipeline stage's L routers,
    over the global batch: `loads` [L, E] are tokens per expert, `score_sums` [L, E] sums of the tokens'
    normalized scores, `balance_losses` [L] mean auxiliary losses.
    """

    loss: float
    loss_sums: Tensor
    token_counts: Tensor
    contents: Tensor
    grad_norm: float | None
    applied: bool
    loss_scale: float | None
    settling: bool
    loads: Tensor
    score_sums: Tensor
    balance_losses: Tensor


class HostCopy:
    """A scalar on its way to the host: `read` waits for this copy, not for what was queued after it."""

    def __init__(self, value: Tensor) -> None:
        self._value = value.detach().to("cpu", non_blocking=True)  # from CUDA, to pinned memory
        self._copied = torch.cuda.Event() if value.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    def read(self) -> float:
        if self._copied is not None:
            self._copied.synchronize()
        return float(self._value.numpy())


def _masks(loss_mask_BS: Tensor, depths: int, cp_group: dist.ProcessGroup) -> Tensor:
    """Which predictions have a label that counts [K, B, S]: depth k has none for the last k positions."""
    masks = [loss_mask_BS]
    for _ in range(1, depths):
        masks.append(roll_tensor(masks[-1], shifts=-1, dims=-1, cp_group=cp_group)[0])
    return torch.stack(masks)


def _loss(
    batch: dict[str, Tensor],
    mtp_loss_weight: float,
    contents: Contents,
    cp_group: dist.ProcessGroup,
    losses_KBS: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(summed objective, tokens, [2, K + C] sums and counts to report) of one micro-batch on this rank.

    `batch` is this rank's part of the sequences.
    """
    depths = losses_KBS.shape[0]
    masks_KBS = _masks(batch["loss_mask"], depths, cp_group)
    counted_KBS = losses_KBS * masks_KBS
    sums_K = counted_KBS.sum(dim=(1, 2))
    weights_K = torch.full_like(sums_K, mtp_loss_weight / max(1, depths - 1))
    weights_K[0] = 1.0
    counts_K = masks_KBS.sum(dim=(1, 2))
    report = torch.stack((sums_K.detach(), counts_K)).double()
    report = torch.cat((report, contents.count(batch, counted_KBS[0].detach(), masks_KBS[0])), dim=1)
    return (sums_K * weights_K).sum(), counts_K[0].to(torch.int), report


class TrainingStep:
    """The model, its optimizer, and the steps they take; one per process.

    `chunks` are the data-parallel-wrapped model chunks of this rank; `contents` is what to count in the
    batches of training, `phases` where the time goes.
    """

    def __init__(self, config: Config, resolved: Resolved, contents: Contents | None = None) -> None:
        self.config, self.resolved = config, resolved
        self.contents = contents or Contents()
        self.phases = PhaseClock(cuda=resolved.device == "cuda")
        self.groups = ProcessGroupCollection.use_mpu_process_groups()
        self.chunks = wrap_data_parallel(config, resolved, build_model(config, resolved))
        self.optimizer: MegatronOptimizer = build_optimizer(config, resolved, self.chunks)
        self.routers = routers_of(self.chunks)
        self.depths = 1 + resolved.shape.mtp_depth
        self._graphs = GraphCapture(config, resolved, self.chunks, self.optimizer)
        self._schedule = get_forward_backward_func()

    @property
    def data_parallel_rank(self) -> int:
        """Which replica of the model this process belongs to."""
        return int(self.groups.dp.rank())

    @property
    def delayed_scaling(self) -> bool:
        """Whether FP8 scales come from earlier steps, so that they are state."""
        return has_delayed_scaling(self.config.training.model_dump())

    @property
    def needs_data(self) -> bool:
        """Whether this rank's stages read batches: ends of the pipeline, or everybody for masks."""
        data = self.config.data
        ends = parallel_state.is_pipeline_first_stage() or parallel_state.is_pipeline_last_stage()
        return ends or data.document_mask or data.reset_position_ids

    def _forward_step(
        self,
        mtp_loss_weight: float,
        seq_length: int,
        contents: Contents,
        batches: Iterator[dict[str, Tensor]] | None,
        model: torch.nn.Module,
        return_schedule_plan: bool = False,
    ) -> tuple[Any, Any]:
        """What Megatron-Core's schedules call for each micro-batch and model chunk.

        Its combined schedule asks for the pieces of the forward pass in place of the output, and gives the
        model without wrappers.
        """
        forward: Callable[..., Any] = model
        if return_schedule_plan:
            forward = cast(LanguageModel, model).build_schedule_plan
        device, cp = torch.cuda.current_device(), self.groups.cp
        positions = torch.arange(seq_length, device=device).unsqueeze(0)
        if batches is None:
            return forward(None, None, positions), None
        batch = {
            name: tensor.to(device, non_blocking=True)
            for name, tensor in shortened(next(batches), seq_length).items()
        }
        data = self.config.data
        part = batch | {name: local_part(batch[name], cp) for name in ("tokens", "labels", "loss_mask")}
        output = forward(
            part["tokens"],
            part["labels"],
            batch["position_ids"] if data.reset_position_ids else positions,
            batch["document_ids"] if data.document_mask else None,
        )
        return output, partial(_loss, part, mtp_loss_weight, contents, cp)

    def _run(
        self,
        batches: Iterator[dict[str, Tensor]] | None,
        micro_batches: int,
        *,
        mtp_loss_weight: float,
        seq_length: int,
        training: bool,
    ) -> Tensor:
        """[2, K + C] loss sums and token counts over all micro-batches and ranks; C is 0 in evaluation."""
        full, chunks = self.config.training, len(self.chunks)
        contents = self.contents if training else Contents()
        iterators = _share(batches, chunks) if chunks > 1 else batches
        reports = self._schedule(
            forward_step_func=partial(self._forward_step, mtp_loss_weight, seq_length, contents),
            data_iterator=iterators,
            model=self.chunks,
            num_microbatches=micro_batches,
            seq_length=seq_length,
            micro_batch_size=full.micro_batch_size * (full.seq_length // seq_length),
            forward_only=not training,
        )
        device = torch.cuda.current_device()
        columns = self.depths + len(contents.names)
        total = torch.zeros(2, columns, dtype=torch.float64, device=device)
        for report in reports:
            total += report
        dist.all_reduce(total, group=self.groups.dp_cp)
        if self.resolved.pp > 1:
            last = dist.get_process_group_ranks(self.groups.pp)[-1]
            dist.broadcast(total, last, group=self.groups.pp)
        return total

    def train(
        self,
        batches: Iterator[dict[str, Tensor]] | None,
        micro_batches: int,
        scalars: Scalars,
        accept: Callable[[float], bool] | None = None,
    ) -> StepResult:
        """One optimizer step over `micro_batches` batches per replica; None where no data is needed.

        `accept` is asked with the loss, on every rank alike; where it says no, nothing is updated. To ask
        it waits for the forward passes; without it the only wait is the one for the gradient norm.
        """
        for chunk in self.chunks:
            chunk.train()
        self._graphs.before_step(micro_batches)
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        for router in self.routers:
            router.reset_statistics()
            router.noise_std = scalars.router_noise_std
            router.temperature = scalars.router_temperature
            router.aux_loss_weight = scalars.aux_loss_weight
        self.optimizer.zero_grad()
        with self.phases.phase("forward_backward"):
            report = self._run(
                None if batches is None else self.phases.each("data", batches),
                micro_batches,
                mtp_loss_weight=scalars.mtp_loss_weight,
                seq_length=scalars.seq_length,
                training=True,
            )
        (sums, counts), contents = report[:, : self.depths], report[:, self.depths :]
        loss = HostCopy(sums[0] / counts[0].clamp(min=1))
        applied, settling, grad_norm = False, False, None
        if accept is None or accept(loss.read()):
            set_learning_rate(self.optimizer, scalars.learning_rate, scalars.weight_decay)
            with self.phases.phase("optimizer"), contextlib.suppress(NonFiniteGradientsError):
                applied, grad_norm, _ = self.optimizer.step()
            settling = not applied and loss_scale_can_fall(self.optimizer)
        advance_histories(self.chunks, self.groups)
        loads, score_sums, balance_losses = self._router_statistics(micro_batches)
        if applied and self.config.model.moe.use_aux_loss_free:
            moe = self.config.model.moe
            update_expert_biases(
                self.routers, loads, scalars.bias_update_rate, centered=moe.bias_update_centered
            )
        return StepResult(
            loss=loss.read(),
            loss_sums=sums,
            token_counts=counts,
            contents=contents,
            grad_norm=grad_norm,
            applied=bool(applied),
            loss_scale=loss_scale(self.optimizer),
            settling=settling,
            loads=loads,
            score_sums=score_sums,
            balance_losses=balance_losses,
        )

    def gather_parameters(self) -> None:
        """Finish the parameter gathering that overlaps with the next forward pass: before a save."""
        for chunk in self.chunks:
            if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
                chunk.disable_forward_pre_hook()
                chunk.enable_forward_pre_hook()

    def release_graphs(self) -> None:
        """Give up captured graphs: before the process groups are undone."""
        self._graphs.release()

    def forget_gathered(self) -> None:
        """Have sharded weights (ZeRO-2, ZeRO-3) gathered anew: around a change of the shards."""
        for chunk in self.chunks:
            if isinstance(chunk, FullyShardedChunk):
                chunk.forget_gathered()

    def squared_parameter_norm_share(self) -> Tensor:
        """This rank's share of the squared norm of all parameters; collective, see `squared_norm_share`."""
        self.gather_parameters()
        return squared_norm_share(self.chunks, self.groups)

    @torch.no_grad()
    def evaluate(
        self, batches: Iterator[dict[str, Tensor]] | None, micro_batches: int
    ) -> tuple[Tensor, Tensor]:
        """Loss sums and token counts [K] over `micro_batches` batches per replica, without gradients."""
        for chunk in self.chunks:
            chunk.eval()
        length = self.config.training.seq_length
        sums, counts = self._run(
            batches, micro_batches, mtp_loss_weight=0.0, seq_length=length, training=False
        )
        return sums, counts

    def _router_statistics(self, micro_batches: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of this stage: loads and score sums of the global batch [L, E], mean balance losses [L]."""
        if not self.routers:
            nothing = torch.zeros(0, 0, device=torch.cuda.current_device())
            return nothing, nothing, nothing.flatten()
        rows = [
            torch.cat((router.tokens_per_expert, router.score_sums, router.balance_loss))
            for router in self.routers
        ]
        together = torch.stack(rows)
        dist.all_reduce(together, group=self.groups.tp_dp_cp)
        experts = self.config.model.moe.num_experts
        loads, score_sums, losses = together.split((experts, experts, 1), dim=1)
        return loads, score_sums, losses[:, 0] / (micro_batches * self.resolved.dp)


def has_delayed_scaling(training: dict[str, Any]) -> bool:
    """Whether FP8 scales come from earlier steps in a run with this `training` section."""
    return bool(training.get("use_fp8")) and training["fp8"]["recipe"] == "delayed"


def shortened(batch: dict[str, Tensor], seq_length: int) -> dict[str, Tensor]:
    """A micro-batch [B, S] cut into sequences of `seq_length`, [B * S / seq_length, seq_length].

    No token is dropped: a label still is the next token, across a cut too. Positions restart at a cut,
    where the part of a document before it is out of sight.
    """
    full = batch["tokens"].shape[1]
    if seq_length == full:
        return batch
    cut = {
        name: tensor.repeat_interleave(full // seq_length)  # of a sample as a whole: its source
        if tensor.dim() == 1
        else tensor.unflatten(1, (-1, seq_length)).flatten(0, 1)
        for name, tensor in batch.items()
    }
    places = torch.arange(full).unflatten(0, (-1, seq_length)).repeat(len(batch["tokens"]), 1)
    begins = (places - cut["position_ids"]).maximum(places[:, :1])  # of the document, or of the cut
    return cut | {"position_ids": places - begins}


def _share(batches: Iterator[dict[str, Tensor]] | None, chunks: int) -> list[Any]:
    """An iterator per model chunk over the same batches: each chunk sees every micro-batch."""
    if batches is None:
        return [None] * chunks
    return list(itertools.tee(batches, chunks))
