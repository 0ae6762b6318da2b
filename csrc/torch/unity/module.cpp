// Read as one; see pairs.cpp.
#include "torch/autograd.cpp"
#include "torch/fast_path.cpp"
#include "torch/ops.cpp"
#include "torch/sizes.cpp"
