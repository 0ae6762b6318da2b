#include "engine.cuh"

template struct dml::cuda::Engine<dml::cuda::HalfMath<__nv_bfloat16>>;
