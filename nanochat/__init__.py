"""nanochat for DGX Spark: a ChatGPT-like model from scratch, in one small codebase."""
