"""Imports and caches that readers of files need, for the process that readers are forked from: it imports this once."""

import io

import matplotlib.backends.backend_agg  # noqa: F401
import pyarrow.compute  # noqa: F401
from matplotlib.figure import Figure
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from benchmarks import attack  # noqa: F401  # the main module, which multiprocessing imports in every process
from nanochat.data import demo_data

demo_data.articles("val")
get_checkpoint_conversion_mapping("apertus")
Figure().savefig(io.BytesIO(), format="png")
