// Read as one; see pairs.cpp.
#include "../cpu/listed_pairs.cpp"
#include "../cpu/triplet_list.cpp"
#include "../cpu/triplet_loss.cpp"
#include "../cpu/triplet_select.cpp"
