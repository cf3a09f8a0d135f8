"""The LlamaGen transformer, its sampler and its weights on disk."""
