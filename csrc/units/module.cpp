// Read as one; see pairs.cpp.
#include "../autograd.cpp"
#include "../ops.cpp"
#include "../plain_batch.cpp"
