"""The training run: its state, its step and loop, and what a person sees of it."""
