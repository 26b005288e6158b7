// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/parallel.h"
#include "kv/problem.h"

// How the codec goes through tokens on the CPU: a task is a block of one head.
namespace singlepass::kv {

// Where a task's block stands.
struct BlockRange {
  int64_t b, h, block, begin, count, end;  // slots from begin on, of which count hold a token

  BlockRange(const CodecCall& p, int64_t task) {
    block = task % p.blocks.num_blocks;
    h = task / p.blocks.num_blocks % p.heads;
    b = task / p.blocks.num_blocks / p.heads;
    begin = p.blocks.starts[block];
    end = p.blocks.starts[block + 1];
    count = p.blocks.count(b, h, block);
  }
};

// Calls run(place) of a Worker for each block; a Worker belongs to one thread.
template <class Worker>
void for_each_block(const CodecCall& p, const ParallelFor& parallel_for) {
  const int64_t tasks = p.batch * p.heads * p.blocks.num_blocks;
  const int64_t elements = p.batch * p.heads * p.packed.head_dim * p.blocks.starts[p.blocks.num_blocks];
  parallel_for_elements(parallel_for, tasks, elements, [&](int64_t begin, int64_t end) {
    Worker worker(p);
    for (int64_t task = begin; task < end; ++task) worker.run(BlockRange(p, task));
  });
}

}  // namespace singlepass::kv
