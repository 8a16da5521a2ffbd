// The CPU passes for AVX-512, vectorised by the compiler.
#include "ops/contrastive_par_rows.h"

namespace pybackdoor {

const ContrastiveParRows& contrastive_par_avx512_rows() {
  static constexpr ContrastiveParRows rows = PB_CONTRASTIVE_PAR_ROWS("avx512", 16, 1);
  return rows;
}

}  // namespace pybackdoor
