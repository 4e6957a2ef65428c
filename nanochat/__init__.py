"""nanochat for DGX Spark: a ChatGPT-like model from scratch, in one small codebase."""

import warnings

# torch warns on every GB10 that it "does not include kernels for this GPU". It does: those for sm_120 run on sm_121.
warnings.filterwarnings("ignore", r"Found GPU\d+ .* compute capability \(CC\) 12\.1\.", UserWarning)
