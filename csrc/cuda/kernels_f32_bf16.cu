#include "blocks.cuh"

template struct dml::cuda::Engine<dml::cuda::Bf16Math>;
template struct dml::cuda::BlockEngine<dml::cuda::Bf16Math>;
