"""One step of an optimizer over many tensors."""
