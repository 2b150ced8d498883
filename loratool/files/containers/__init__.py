"""Read and write the containers of tensors: safetensors, GGUF, torch's files, and those that are never written."""
