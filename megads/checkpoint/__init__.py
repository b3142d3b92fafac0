"""Checkpoints that survive a crash: Megatron-Core's `torch_dist` format inside a commit protocol of ours.

`store` is what training uses; `commit` and `manifest` are the protocol on plain files (no torch);
`sharded` talks to Megatron-Core; `pickles` refuses crafted pickles; `lease` keeps a second job out
of the directory; `compare` refuses a checkpoint of another model.
"""
