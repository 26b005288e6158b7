// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace singlepass::kv {

// Calls body.template operator()<kRows>(row) for 4 rows at a time, and for what is left.
template <class Body>
void by_rows(int64_t rows, const Body& body) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) body.template operator()<4>(r);
  if (rows - r == 3) body.template operator()<3>(r);
  if (rows - r == 2) body.template operator()<2>(r);
  if (rows - r == 1) body.template operator()<1>(r);
}

}  // namespace singlepass::kv
