#include "cuda/pairs/grad_math.cuh"
#include "cuda/pairs/look.cuh"

template struct dml::cuda::Look<float>;
DML_WEIGHTS(float, dml::cuda::WeightLayout<dml::cuda::ScaledMath<2>>);
DML_WEIGHTS(float, dml::cuda::WeightLayout<dml::cuda::ScaledMath<1>>);
DML_WEIGHTS(float, dml::cuda::WeightLayout<dml::cuda::HalfMath<__nv_bfloat16>>);
