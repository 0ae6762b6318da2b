#include "cuda/ring/ring.cuh"

template struct dml::cuda::Engine<dml::cuda::SimtMath<double>>;
template struct dml::cuda::BlockEngine<dml::cuda::SimtMath<double>>;
