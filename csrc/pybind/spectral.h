// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pybind11/pybind11.h>

namespace singlepass::pybind {

void define_spectral(pybind11::module_& m);

}  // namespace singlepass::pybind
