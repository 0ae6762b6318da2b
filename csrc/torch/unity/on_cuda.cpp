// Read as one; see pairs.cpp. For a build with the CUDA kernels.
#include "torch/cuda_centers.cpp"
#include "torch/cuda_pairs.cpp"
#include "torch/cuda_ring.cpp"
#include "torch/cuda_triplets.cpp"
