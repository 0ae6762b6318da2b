#include "cuda/ring/ring.cuh"

template struct dml::cuda::Engine<dml::cuda::HalfMath<__nv_bfloat16>>;
template struct dml::cuda::BlockEngine<dml::cuda::HalfMath<__nv_bfloat16>>;
