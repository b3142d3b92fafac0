"""Imported once by the server that forks the tests' processes."""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # these tests are of the CPU path, whatever the machine has

from megads.mcore.compat import quiet_megatron
from megads.mcore.cpu import install_cpu_substitutions

quiet_megatron()
install_cpu_substitutions()

import megatron.core.optimizer  # noqa: E402
import megatron.core.pipeline_parallel.schedules  # noqa: E402, F401
import torch._dynamo  # noqa: E402  # torch's optimizers import it when they are first used
import torch._inductor  # noqa: E402, F401

import megads.checkpoint.store  # noqa: E402
import megads.config.loader  # noqa: E402
import megads.config.validate  # noqa: E402
import megads.model.build  # noqa: E402
import megads.train.snapshot  # noqa: E402, F401
