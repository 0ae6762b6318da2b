// Read as one: torch's headers take a compiler longer than most of these files.
#include "cpu/pairs/formula_ops.cpp"
#include "cpu/pairs/ops.cpp"
#include "cpu/pairs/ring.cpp"
