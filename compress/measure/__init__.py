"""Numbers of a model, before and after: counts, size, latency, and the table of them."""

from compress.measure.environment import environment
from compress.measure.latency import Latency, latencies, latency
from compress.measure.summary import ModelSummary, model_size_mb, summarize
from compress.measure.table import Measurement, Table, compare, table

__all__ = [
    "Latency",
    "Measurement",
    "ModelSummary",
    "Table",
    "compare",
    "environment",
    "latencies",
    "latency",
    "model_size_mb",
    "summarize",
    "table",
]
