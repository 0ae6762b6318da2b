// A list of one formula, for programs that need no other and compile in a fraction of the time.
#pragma once

#include "losses/multi_similarity.h"

#define DML_FORMULAS(X) X(multi_similarity, MultiSimilarity)
