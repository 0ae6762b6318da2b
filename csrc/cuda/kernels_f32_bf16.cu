#include "engine.cuh"

template struct dml::cuda::Engine<dml::cuda::Bf16Math>;
