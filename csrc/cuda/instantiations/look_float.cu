#include "cuda/pairs/look.cuh"

template struct dml::cuda::Look<float>;
DML_WEIGHTS(float, float);
DML_WEIGHTS(dml::cuda::RoundedToTf32, float);
DML_WEIGHTS(__nv_bfloat16, float);
