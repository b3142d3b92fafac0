"""Cleaning a corpus: what to take out of it, found on disk-sized data by vectorized passes over hashes.

No torch here, and nothing is imported before it is used.
"""
