"""Imports and caches for the process that readers of files and servers are forked from, which imports this once."""

import io

import matplotlib.backends.backend_agg  # noqa: F401
import pyarrow.compute  # noqa: F401
from matplotlib.figure import Figure
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from benchmarks.attacks import environment, local, sandbox, server  # noqa: F401  # the main module imports them
from nanochat.data import demo_data

demo_data.articles("val")
get_checkpoint_conversion_mapping("apertus")
Figure().savefig(io.BytesIO(), format="png")
