// Row kernels for AVX2: the plain ones, vectorised by the compiler.
#include "ops/trigger_normalize_rows.h"

namespace pybackdoor {

const RowOps& avx2_rows() {
  static constexpr RowOps ops = PB_GENERIC_ROWS("avx2");
  return ops;
}

}  // namespace pybackdoor
