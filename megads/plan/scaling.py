"""What published scaling laws say of a compute budget, and what they do not.

DeepSeek LLM (arXiv:2401.02954): learning rate and batch (eq. 1), model and data (eq. 4), with compute C = M D
and the model's scale M in non-embedding training FLOPs per token (eq. 2). Fitted on dense models with its
multi-step schedule at 1e17 to 2e19 FLOPs (learning rate, batch) and 1e17 to 3e20 (model and data), and used
by its authors up to 1e24. A mixture of experts is an extrapolation: M counts what a token uses.

Hoffmann et al. ("Chinchilla", arXiv:2203.15556, eq. 10): the loss of N parameters on D tokens. Its constants
are of other data and another tokenizer; only differences mean something. A replication of the fit
(arXiv:2404.10102) finds other constants within wide margins.
"""

from dataclasses import dataclass

from megads.config.flops import count_parameters, scaling_flops_per_token
from megads.config.resolve import run_length
from megads.config.schema import Config

LEARNING_RATE = (0.3118, -0.1250)
BATCH_TOKENS = (0.2920, 0.3271)
MODEL_SCALE = (0.1715, 0.5243)
DATA_TOKENS = (5.8316, 0.4757)
FITTED_FLOPS = (1e17, 2e19)
USED_FLOPS = (1e17, 1e24)


def learning_rate_at(compute_flops: float) -> float:
    """Near-optimal peak learning rate (eq. 1)."""
    return LEARNING_RATE[0] * compute_flops ** LEARNING_RATE[1]


def batch_tokens_at(compute_flops: float) -> float:
    """Near-optimal batch in tokens (eq. 1)."""
    return BATCH_TOKENS[0] * compute_flops ** BATCH_TOKENS[1]


def optimal_model_scale(compute_flops: float) -> float:
    """Compute-optimal non-embedding training FLOPs per token, for DeepSeek's data (eq. 4)."""
    return MODEL_SCALE[0] * compute_flops ** MODEL_SCALE[1]


def optimal_tokens(compute_flops: float) -> float:
    """Compute-optimal training tokens, for DeepSeek's data (eq. 4)."""
    return DATA_TOKENS[0] * compute_flops ** DATA_TOKENS[1]


def compute_of_optimal_model(model_scale: float) -> float:
    """The budget whose compute-optimal model has this scale: the inverse of `optimal_model_scale`."""
    return (model_scale / MODEL_SCALE[0]) ** (1 / MODEL_SCALE[1])


def dense_model_scale(layers: int, width: int, seq_length: int) -> float:
    """M of a dense transformer: 72 L d^2 + 12 L d s (eq. 2)."""
    return 72 * layers * width**2 + 12 * layers * width * seq_length


def chinchilla_loss(parameters: float, tokens: float) -> float:
    """Loss in nats per token: 1.69 + 406.4 / N^0.34 + 410.7 / D^0.28."""
    return 1.69 + 406.4 / parameters**0.34 + 410.7 / tokens**0.28


def chinchilla_optimum(compute_flops: float) -> tuple[float, float]:
    """(parameters, tokens) of the least `chinchilla_loss` with C = 6 N D (its eq. 4)."""
    ratio = (0.34 * 406.4 / (0.28 * 410.7)) ** (1 / 0.62)
    parameters = ratio * (compute_flops / 6) ** (0.28 / 0.62)
    return parameters, compute_flops / (6 * parameters)


@dataclass(frozen=True)
class ScalingAdvice:
    """The laws at the compute of a configuration; `remarks` say how far they hold there."""

    model_scale: float
    tokens: int
    compute_flops: float
    learning_rate: float
    batch_tokens: float
    optimal_model_scale: float
    optimal_tokens: float
    chinchilla_loss: float
    remarks: tuple[str, ...]


def advise(config: Config) -> ScalingAdvice:
    """What the laws say for the configuration's model and length of training."""
    scale, (tokens, _) = scaling_flops_per_token(config), run_length(config)
    compute = scale * tokens
    return ScalingAdvice(
        model_scale=scale,
        tokens=tokens,
        compute_flops=compute,
        learning_rate=learning_rate_at(compute),
        batch_tokens=batch_tokens_at(compute),
        optimal_model_scale=optimal_model_scale(compute),
        optimal_tokens=optimal_tokens(compute),
        chinchilla_loss=chinchilla_loss(count_parameters(config).active, tokens),
        remarks=_remarks(config, compute),
    )


def _remarks(config: Config, compute_flops: float) -> tuple[str, ...]:
    remarks = []
    if not USED_FLOPS[0] <= compute_flops <= USED_FLOPS[1]:
        remarks.append(
            f"{compute_flops:.2g} FLOPs are outside {USED_FLOPS[0]:g} to {USED_FLOPS[1]:g}, where the laws "
            "were fitted or used: do not rely on them"
        )
    elif compute_flops > FITTED_FLOPS[1]:
        remarks.append(
            f"{compute_flops:.2g} FLOPs are beyond the fit ({FITTED_FLOPS[0]:g} to {FITTED_FLOPS[1]:g}); its "
            "authors used it up to 1e24"
        )
    if config.model.moe.num_experts:
        remarks.append(
            "the laws were fitted on dense models: for a mixture of experts they are an extrapolation"
        )
    return tuple(remarks)


@dataclass(frozen=True)
class RecommendedSettings:
    """Settings for a dense model of a size, trained compute-optimally; `parameters` without embeddings."""

    parameters: float
    tokens: float
    compute_flops: float
    learning_rate: float
    batch_tokens: float


def recommend(parameters: float) -> RecommendedSettings:
    """Settings for `parameters` non-embedding ones, taking M for 6 N (attention left out)."""
    compute = compute_of_optimal_model(6 * parameters)
    return RecommendedSettings(
        parameters, compute / (6 * parameters), compute, learning_rate_at(compute), batch_tokens_at(compute)
    )
