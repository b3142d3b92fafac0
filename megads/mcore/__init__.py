"""All that MegaDS knows of Megatron-Core's machinery: version, devices, groups, configuration."""
