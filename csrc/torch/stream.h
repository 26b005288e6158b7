// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/stream.h"
#include "torch/arguments.h"

namespace singlepass::registration {

struct StreamPointers {
  std::vector<const float*> reads;
  std::vector<float*> updates;
  int64_t n = 0;
};

inline StreamPointers stream_pointers(const Tensors& reads, const Tensors& updates) {
  if (reads.size() > static_cast<size_t>(kMaxReads) || updates.size() > static_cast<size_t>(kMaxUpdates) ||
      reads.size() + updates.size() == 0) {
    fail("stream_", "one tensor or more, at most ", kMaxReads, " to read and ", kMaxUpdates, " to update; got ",
         reads.size(), " and ", updates.size(), ". Split the call.");
  }
  StreamPointers result;
  const Tensor& first = reads.empty() ? updates[0] : reads[0];
  result.n = first.numel();
  for (const Tensors* list : {&reads, &updates}) {
    for (const Tensor& t : *list) {
      check_device("stream_", "tensors", t, first);
      check_memory("stream_", "tensors", t);
      if (t.scalar_type() != ScalarType::Float || !t.is_contiguous() || t.numel() != result.n) {
        fail("stream_", "contiguous float32 tensors of one size, ", result.n, "; got ", t.numel(), " elements of ",
             torch::headeronly::toString(t.scalar_type()), ". Convert them.");
      }
    }
  }
  for (const Tensor& t : reads) result.reads.push_back(static_cast<const float*>(t.const_data_ptr()));
  for (const Tensor& t : updates) result.updates.push_back(static_cast<float*>(t.data_ptr()));
  return result;
}

template <class Backend>
void stream_(Tensors reads, Tensors updates) {
  const StreamPointers streams = stream_pointers(reads, updates);
  const Backend on("stream_", reads.empty() ? updates[0] : reads[0]);
  stream(streams.reads, streams.updates, streams.n, on.where());
}

template <class Backend, class Library>
void register_stream(Library& m) {
  m.impl("stream_", TORCH_BOX(&stream_<Backend>));
}

}  // namespace singlepass::registration
