// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <iterator>

#include "common/raw.h"
#include "rational/problem.h"

// Which elements a thread owns. All elements of a thread are of one group, so that its coefficients and its sums stay
// in registers.
//
// If channels are neighbours in memory (inner = 1), a thread block covers a tile of columns: whole groups, or a part of
// one. A thread keeps its column, a vector of channels of one group, and goes down the rows (the outer dimension).
// Otherwise a thread block covers one channel, and its threads go through the channel's planes (the inner dimension).
// So a run of elements that divides into vectors is a group's channels, or a plane.
namespace singlepass::rational {

struct Grid {
  int width;          // elements of a vector
  int step;           // elements from one vector of a run to the next
  int columns, rows;  // of a thread block: thread t has column t % columns and row t / columns
  int threads;        // columns * rows, rounded up to whole warps
  bool planes;
  int groups_per_tile;    // groups that a thread block covers
  int parts;              // tiles that share a group
  int span;               // columns of a thread block that belong to one group
  int64_t run;            // elements of a run
  int64_t group_vectors;  // inner = 1: vectors of a group in a row
  int64_t tiles;          // thread blocks side by side, which together cover all channels
  int64_t plane_vectors;  // vectors of a plane; 1 if inner = 1
  int64_t items;          // vectors of a column, or of all planes of a channel
  int64_t splits;         // thread blocks that share the items of a column
  int64_t slots;          // of a group's partial sums: a slot for each of its thread blocks, and an even number
  int64_t outer_step, inner_step;  // planes: from an item of a thread to its next, in planes and in vectors of a plane
  int rounds;                      // items of a thread; a rest of the threads takes one more
  int64_t rest;
};

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

inline bool fits_vectors(const Problem& p, const View& view) {
  if (view.data == nullptr) return true;
  const bool aligned = reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
  return aligned && view.outer_stride % kVector == 0 && (p.inner == 1 || view.channel_stride % kVector == 0);
}

// Whether kernels can access all tensors in vectors of kVector elements.
inline bool fits_vectors(const Problem& p) {
  const View views[] = {p.x, p.gate, p.y, p.grad, p.grad_x, p.grad_gate};
  if ((p.inner == 1 ? p.group_size() : p.inner) % kVector != 0) return false;
  return std::all_of(std::begin(views), std::end(views), [&](const View& view) { return fits_vectors(p, view); });
}

// Whether vectors are spread over their runs.
SINGLEPASS_HD constexpr bool spreads(DType dtype, int width) {
  return width == kVector && dtype == DType::kFloat32;
}

inline Grid make_grid(const Problem& p, int width, const LaunchShape& shape) {
  Grid g = {};
  g.width = width;
  g.planes = p.inner != 1;
  g.run = g.planes ? p.inner : p.group_size();
  g.step = width == 1 ? 1 : Vectors{spreads(p.dtype, width)}.step();
  g.groups_per_tile = 1;
  g.columns = 1;
  if (g.planes) {
    g.parts = static_cast<int>(p.group_size());
    g.tiles = p.channels;
    g.plane_vectors = p.inner / width;
  } else {
    g.group_vectors = std::max<int64_t>(1, p.group_size() / width);
    g.plane_vectors = 1;
    // A group wider than a thread block is shared by several; of narrower groups, a thread block takes as many as fit,
    // in equal shares.
    if (g.group_vectors > shape.threads) {
      g.parts = static_cast<int>(ceil_div(g.group_vectors, shape.threads));
      g.columns = static_cast<int>(ceil_div(g.group_vectors, g.parts));
      g.tiles = p.groups() * g.parts;
    } else {
      g.parts = 1;
      const int64_t tiles = ceil_div(p.groups() * g.group_vectors, shape.threads);
      g.groups_per_tile = static_cast<int>(
          std::min(ceil_div(p.groups(), tiles), static_cast<int64_t>(shape.threads) / g.group_vectors));
      g.columns = static_cast<int>(g.groups_per_tile * g.group_vectors);
      g.tiles = ceil_div(p.groups(), g.groups_per_tile);
    }
  }
  g.span = g.columns / g.groups_per_tile;
  g.rows = shape.threads / g.columns;
  g.threads = static_cast<int>(ceil_div(g.columns * g.rows, 32)) * 32;
  g.items = p.outer * g.plane_vectors;
  return g;
}

// The second dimension of a CUDA grid has at most 65535 thread blocks. No memory holds 2^31 items for each thread.
inline void set_splits(Grid& g, int64_t splits) {
  g.splits = std::clamp<int64_t>(splits, 1, 65535);
  g.slots = ceil_div(g.parts * g.splits, 2) * 2;
  const int64_t threads = g.splits * g.rows;  // of a column
  g.outer_step = threads / std::max<int64_t>(1, g.plane_vectors);
  g.inner_step = threads % std::max<int64_t>(1, g.plane_vectors);
  g.rounds = static_cast<int>(g.items / threads);
  g.rest = g.items % threads;
}

// From an item of a thread to its next the address moves by `step`, and by `skip` where that is in a later plane than
// outer_step says.
inline Problem with_steps(Problem p, const Grid& g) {
  for (View* view : {&p.x, &p.gate, &p.y, &p.grad, &p.grad_x, &p.grad_gate}) {
    if (view->data == nullptr) continue;
    view->step = size_of(p.dtype) * (g.outer_step * view->outer_stride + g.inner_step * g.step);
    view->skip = size_of(p.dtype) * (view->outer_stride - g.plane_vectors * g.step);
  }
  return p;
}

// Partial sums of a group: the gradients of a_0 to a_M, then of b_0 to b_N.
template <int M, int N>
inline constexpr int kSums = M + 1 + N + 1;

// As many splits as are useful (so many items at least for each thread) and wanted (shape.blocks in all).
inline int64_t useful_splits(const Grid& g, int items, const LaunchShape& shape) {
  return std::min(ceil_div(g.items, int64_t{g.rows} * items), ceil_div(shape.blocks, std::max<int64_t>(1, g.tiles)));
}

inline Grid forward_grid(const Problem& p, int width, const LaunchShape& shape) {
  Grid g = make_grid(p, width, shape);
  set_splits(g, useful_splits(g, shape.forward_items, shape));
  return g;
}

// The same as far as partial sums have room: of a split, in doubles, for coefficients and for channels with a bias.
inline Grid backward_grid(const Problem& p, int width, int sums, const LaunchShape& shape) {
  Grid g = make_grid(p, width, shape);
  const int64_t count = p.groups() * g.parts * sums + (p.bias.data == nullptr ? 0 : p.channels);
  const int64_t affordable = shape.partial_bytes / (8 * std::max<int64_t>(1, count));
  set_splits(g, std::min(useful_splits(g, shape.backward_items, shape), affordable));
  return g;
}

}  // namespace singlepass::rational
