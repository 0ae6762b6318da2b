// Read as one: torch's headers take a compiler longer than most of these files.
#include "../cpu/blocks.cpp"
#include "../cpu/law_ops.cpp"
#include "../cpu/pair_ops.cpp"
