"""From Dolma-format text to micro-batches: readers, tokenizers, indexed files, blends, loader.

Nothing is imported here, so that the offline tools, which need no torch, start in no time.
"""
