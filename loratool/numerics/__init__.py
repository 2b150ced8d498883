"""Pure numerics: tensors in, tensors out, device and dtype from the inputs."""
