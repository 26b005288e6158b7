// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace singlepass::kv {

// Calls body.template operator()<kRows>(row) for 4, 2 or 1 rows at a time.
template <class Body>
void by_rows(int64_t rows, const Body& body) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) body.template operator()<4>(r);
  if (r + 2 <= rows) {
    body.template operator()<2>(r);
    r += 2;
  }
  if (r < rows) body.template operator()<1>(r);
}

}  // namespace singlepass::kv
