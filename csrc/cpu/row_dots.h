// Row dots on the CPU.
#pragma once

#include "cpu/cpu_features.h"
#include "row_dots_arguments.h"

namespace citi {

// Into how many parts the tokens are cut.
int64_t RowDotsParts(int64_t num_tokens, int64_t num_features, int64_t num_segments);

// Adds to the scores; the arguments must be valid (`Invalid`), the variant runnable.
void AccumulateRowDots(const RowDots& dots, Variant variant, int64_t num_threads);

// The first stage: writes the sums (S,) of the tokens in [begin, end). One for each variant.
using RowDotsOfTokens = void(const RowDots& dots, int64_t begin, int64_t end, double* sums);
RowDotsOfTokens RowDotsOfTokensPortable;
RowDotsOfTokens RowDotsOfTokensAvx2;
RowDotsOfTokens RowDotsOfTokensAvx512;

}  // namespace citi
