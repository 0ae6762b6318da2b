#include "cuda/pairs/look.cuh"

template struct dml::cuda::Look<double>;
DML_WEIGHTS(double, double);
