#include "cuda/ring/ring.cuh"

template struct dml::cuda::Engine<dml::cuda::ScaledMath<2>>;
template struct dml::cuda::BlockEngine<dml::cuda::ScaledMath<2>>;
