"""nanochat for DGX Spark: a ChatGPT-like model from scratch, in one small codebase."""

import logging
import warnings

# torch warns on every GB10 that it "does not include kernels for this GPU". It does: those for sm_120 run on sm_121.
warnings.filterwarnings("ignore", r"Found GPU\d+ .* compute capability \(CC\) 12\.1\.", UserWarning)
# And "Not enough SMs to use max_autotune_gemm mode", a mode that is not used here, whenever it compiles.
logging.getLogger("torch._inductor.utils").addFilter(lambda record: "max_autotune" not in str(record.msg))
