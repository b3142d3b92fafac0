"""Imported once by the server that forks the tests' processes."""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # these tests are of the CPU path, whatever the machine has

from megads.mcore.compat import quiet_megatron  # noqa: E402
from megads.mcore.cpu import install_cpu_substitutions  # noqa: E402

quiet_megatron()
install_cpu_substitutions()

import megatron.core.optimizer  # noqa: E402, F401
import megatron.core.pipeline_parallel.schedules  # noqa: E402, F401
import torch._dynamo  # noqa: E402, F401  # torch's optimizers import it when they are first used
import torch._inductor  # noqa: E402, F401

import megads.checkpoint.store  # noqa: E402, F401
import megads.config.loader  # noqa: E402, F401
import megads.config.validate  # noqa: E402, F401
import megads.model.build  # noqa: E402, F401
import megads.train.snapshot  # noqa: E402, F401
