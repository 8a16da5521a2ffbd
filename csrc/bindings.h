// What the files that bind an op share: addresses, sizes, codes and names in; no torch.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <vector>

#include "core/check.h"
#include "core/cuda_info.h"

namespace pybackdoor {

namespace py = pybind11;

template <typename T>
T* address(uintptr_t value) {  // 0 where a tensor is absent
  return reinterpret_cast<T*>(value);
}

void bind_adamw_ema(py::module_& m);
void bind_contrastive_par(py::module_& m);
void bind_trigger_normalize(py::module_& m);

}  // namespace pybackdoor
