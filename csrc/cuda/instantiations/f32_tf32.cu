#include "cuda/ring/ring.cuh"

template struct dml::cuda::Engine<dml::cuda::ScaledMath<1>>;
template struct dml::cuda::BlockEngine<dml::cuda::ScaledMath<1>>;
