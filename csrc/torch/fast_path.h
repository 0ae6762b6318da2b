// The eager fast path from Python to pair_loss.
#pragma once

#include <pybind11/pybind11.h>

namespace dml {

void def_fast_path(pybind11::module_& m);

}  // namespace dml
