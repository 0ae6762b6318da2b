// Read as one; see pairs.cpp.
#include "cpu/centers/ops.cpp"
#include "cpu/pairs/listed_pairs.cpp"
#include "cpu/triplets/list.cpp"
#include "cpu/triplets/loss.cpp"
#include "cpu/triplets/ranking.cpp"
#include "cpu/triplets/select.cpp"
