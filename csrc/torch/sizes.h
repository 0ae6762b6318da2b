// The sizes that torch.compile asks for before anything runs.
#pragma once

#include <pybind11/pybind11.h>

namespace dml {

void def_sizes(pybind11::module_& m);

}  // namespace dml
