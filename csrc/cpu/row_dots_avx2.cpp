#include "cpu/row_dots.h"
#include "cpu/row_dots_kernels.h"

namespace citi {

void RowDotsOfTokensAvx2(const RowDots& dots, int64_t begin, int64_t end, double* sums) {
  RowDotsOfTokensHere(dots, begin, end, sums);
}

}  // namespace citi
