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

// Calls body.template operator()<kRows, kBits>(row), for codes of 2, 4 or 8 bits.
template <class Body>
void by_rows_and_bits(int64_t rows, int bits, const Body& body) {
  by_rows(rows, [&]<int kRows>(int64_t r) {
    switch (bits) {
      case 2:
        return body.template operator()<kRows, 2>(r);
      case 4:
        return body.template operator()<kRows, 4>(r);
      default:
        return body.template operator()<kRows, 8>(r);
    }
  });
}

}  // namespace singlepass::kv
