// SPDX-License-Identifier: Apache-2.0
#include "spectral/swap.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "common/convert.h"
#include "spectral/sample.h"

namespace singlepass::spectral {
namespace {

void draw(const Draw& layer, const DrawOptions& options) {
  std::vector<float> s(layer.count);
  widen(layer.s, layer.dtype, s.data(), layer.count);
  double total = 0.0;
  for (const float value : s) total += weight_of(value);
  std::vector<double> times(layer.count);
  for (int64_t j = 0; j < layer.count; ++j) {
    times[j] = race_time(options, layer.id, j, probability(weight_of(s[j]), total, layer.count, options.uniform));
  }
  std::vector<int64_t> places(layer.count);
  std::iota(places.begin(), places.end(), int64_t{0});
  const auto middle = places.begin() + layer.rank;
  std::nth_element(places.begin(), middle, places.end(),
                   [&](int64_t a, int64_t b) { return rings_first(times[a], a, times[b], b); });
  std::sort(places.begin(), middle);
  const auto coming = std::lower_bound(places.begin(), middle, layer.rank);  // the first of the frozen ones drawn
  auto next = coming;
  for (int64_t place = 0; place < layer.rank; ++place) {
    const bool stays = std::binary_search(places.begin(), coming, place);
    layer.exchange[place] = stays ? -1 : *next++ - layer.rank;
  }
}

void decode(const int8_t* codes, const float* factors, float* values, int64_t n) {
  for (int64_t i = 0; i < n; ++i) values[i] = static_cast<float>(codes[i]) * factors[i / kBlock];
}

void encode(const float* values, int8_t* codes, float* factors, int64_t n) {
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = std::min(n, begin + kBlock);
    float largest = 0.0f;
    for (int64_t i = begin; i < end; ++i) largest = maximum(std::fabs(values[i]), largest);
    const float factor = factors[begin / kBlock] = factor_of(largest);
    const float inverse = inverse_of(factor);
    for (int64_t i = begin; i < end; ++i) codes[i] = code_of(values[i], inverse);
  }
}

void swap_row(const Swap& pair, int64_t place, std::vector<float>& coming, std::vector<float>& leaving) {
  const int64_t row = pair.exchange[place], n = pair.columns;
  coming.resize(n);
  leaving.resize(n);
  void* active = static_cast<char*>(pair.active) + place * n * size_of(pair.active_dtype);
  widen(active, pair.active_dtype, leaving.data(), n);
  if (pair.scales != nullptr) {
    int8_t* codes = static_cast<int8_t*>(pair.frozen) + row * n;
    float* factors = pair.scales + row * factor_count(n);
    decode(codes, factors, coming.data(), n);
    encode(leaving.data(), codes, factors, n);
  } else {
    void* frozen = static_cast<char*>(pair.frozen) + row * n * size_of(pair.frozen_dtype);
    widen(frozen, pair.frozen_dtype, coming.data(), n);
    narrow(leaving.data(), frozen, pair.frozen_dtype, n);
  }
  narrow(coming.data(), active, pair.active_dtype, n);
}

}  // namespace

void sample(const std::vector<Draw>& layers, const DrawOptions& options, const ParallelFor& parallel_for) {
  parallel_for(static_cast<int64_t>(layers.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) draw(layers[i], options);
  });
}

void swap(const std::vector<Swap>& pairs, const ParallelFor& parallel_for) {
  struct Row {
    const Swap& pair;
    int64_t place;
  };
  std::vector<Row> rows;
  int64_t elements = 0;
  for (const Swap& pair : pairs) {
    for (int64_t place = 0; place < pair.rank; ++place) {
      if (!pair.changes(place)) continue;
      rows.push_back({pair, place});
      elements += pair.columns;
    }
  }
  parallel_for_elements(parallel_for, static_cast<int64_t>(rows.size()), elements, [&](int64_t begin, int64_t end) {
    std::vector<float> coming, leaving;
    for (int64_t i = begin; i < end; ++i) swap_row(rows[i].pair, rows[i].place, coming, leaving);
  });
}

}  // namespace singlepass::spectral
