"""Starting runs: on this machine, over ssh, through DeepSpeed's launcher, through SLURM. No torch here."""
