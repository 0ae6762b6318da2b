#include "engine.cuh"

template struct dml::cuda::Engine<dml::cuda::Tf32Math<float, false>>;
