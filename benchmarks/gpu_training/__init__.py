"""The parts of `benchmarks/train_gpu.py`: shapes, contenders, what one process measures, reports."""
