"""A run as one HTML page: read from `metrics.jsonl` and the saved configuration, drawn by plotly.js.

Imports `config` and `errors` only, and no torch: a report of a run on a cluster is made on a laptop.
"""
