"""The optimizer: Megatron-Core's, on our schedules."""
