"""The model: MLA, MoE and MTP as modules of Megatron-Core's `TransformerBlock`."""
