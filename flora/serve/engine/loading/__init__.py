"""From a registry to packed host memory, beside the running steps."""
