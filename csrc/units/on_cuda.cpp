// Read as one; see pairs.cpp. For a build with the CUDA kernels.
#include "../cuda_blocks.cpp"
#include "../cuda_ops.cpp"
#include "../cuda_triplets.cpp"
