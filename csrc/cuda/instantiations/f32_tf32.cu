#include "cuda/ring/ring.cuh"

template struct dml::cuda::Engine<dml::cuda::Tf32Math<float, false>>;
template struct dml::cuda::BlockEngine<dml::cuda::Tf32Math<float, false>>;
