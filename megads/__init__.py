"""MegaDS: DeepSeek-V3-style pretraining (MLA + MoE + MTP) on Megatron-Core."""

__version__ = "0.1.0"
