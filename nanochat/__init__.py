"""nanochat for DGX Spark: a ChatGPT-like model from nothing, in one small code base."""
