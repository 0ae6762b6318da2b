// Which rows count as 0.
#pragma once

namespace dml {

inline constexpr double kTinyNorm = 1e-12;  // a row of at most this norm has cosine similarity 0 to all

}  // namespace dml
