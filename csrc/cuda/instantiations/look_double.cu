#include "cuda/pairs/grad_math.cuh"
#include "cuda/pairs/look.cuh"

template struct dml::cuda::Look<double>;
DML_WEIGHTS(double, dml::cuda::WeightLayout<dml::cuda::SimtMath<double>>);
