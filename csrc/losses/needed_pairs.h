// Which rows have a loss: the one validity test of both engines.
#pragma once

#include "core/portable.h"

namespace dml {

// The pairs without which a row has no loss (kNeedsPos and kNeedsNeg of its formula).
struct NeededPairs {
    bool pos, neg;

    DML_INLINE constexpr bool present(bool any_pos, bool any_neg) const {
        return (any_pos || !pos) && (any_neg || !neg);
    }
};

// Whether a row with such pairs can have a loss. Mining compares positives with negatives, so it needs both.
DML_INLINE constexpr bool row_has_loss(NeededPairs needed, bool mining, bool any_pos, bool any_neg) {
    return mining ? any_pos && any_neg : (any_pos || any_neg) && needed.present(any_pos, any_neg);
}

}  // namespace dml
