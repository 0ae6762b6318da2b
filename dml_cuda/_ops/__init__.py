"""From a checked batch to a result: which kernels or reference, and what PyTorch must know of the ops."""
