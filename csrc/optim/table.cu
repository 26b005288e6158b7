// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "common/cuda.h"
#include "optim/device_table.h"

namespace singlepass::optim {
namespace {

// Records that travel to the device together, as an argument of one launch: as many as fit beside the others.
// first_chunks: of each, the number of its first chunk in the whole table.
template <int kBytes>
struct Piece {
  static constexpr int kRecords =
      (kBytes - sizeof(int64_t) - sizeof(DeviceTable)) / (sizeof(TensorRecord) + sizeof(int32_t));
  TensorRecord records[kRecords];
  int32_t first_chunks[kRecords];
};

SINGLEPASS_HD int64_t chunks_of(const TensorRecord& t, const LaunchShape& shape) {
  return chunk_count(t.numel, chunk_size(t, shape.chunk));
}

// A thread block for each record copies it, sets its ticket to zero and lists its chunks. first: the number of the
// piece's first tensor in the whole table.
template <int kBytes>
__global__ void expand_piece(const __grid_constant__ Piece<kBytes> piece, int64_t first, const DeviceTable table) {
  const TensorRecord& record = piece.records[blockIdx.x];
  const int64_t tensor = first + blockIdx.x;
  if (threadIdx.x == 0) {
    const_cast<TensorRecord*>(table.records)[tensor] = record;
    table.tickets[tensor] = 0;
    table.tickets[table.tensor_count] = 0;
  }
  Chunk* chunks = const_cast<Chunk*>(table.chunks) + piece.first_chunks[blockIdx.x];
  const int64_t count = chunks_of(record, table.shape);
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
    chunks[i] = {static_cast<int32_t>(tensor), static_cast<int32_t>(i)};
  }
}

constexpr int64_t words_of(int64_t bytes) {
  return (bytes + 7) / 8;
}

// Offsets of the table's parts in the workspace, in 8-byte words. The records are at 0.
struct Layout {
  int64_t chunks, tickets, norms, partials, end;

  Layout(int64_t tensors, int64_t chunk_count)
      : chunks(words_of(tensors * static_cast<int64_t>(sizeof(TensorRecord)))),
        tickets(chunks + words_of(chunk_count * static_cast<int64_t>(sizeof(Chunk)))),
        norms(tickets + words_of((tensors + 1) * static_cast<int64_t>(sizeof(unsigned)))),
        partials(norms + tensors * kNorms),
        end(partials + chunk_count * kNorms) {}
};

template <int kBytes>
void upload_pieces(const HostTable& table, const DeviceTable& device, const Gpu& gpu) {
  int32_t first_chunk = 0;
  for (int64_t first = 0; first < table.tensor_count; first += Piece<kBytes>::kRecords) {
    Piece<kBytes> piece = {};
    const int64_t count = std::min<int64_t>(Piece<kBytes>::kRecords, table.tensor_count - first);
    for (int64_t i = 0; i < count; ++i) {
      piece.records[i] = table.records[first + i];
      piece.first_chunks[i] = first_chunk;
      first_chunk += static_cast<int32_t>(chunks_of(piece.records[i], table.shape));
    }
    launch(&expand_piece<kBytes>, dim3(static_cast<unsigned>(count)), dim3(128), 0, gpu, piece, first, device);
  }
}

}  // namespace

HostTable make_table(const std::vector<TensorRecord>& tensors, int state_count, LaunchShape shape) {
  HostTable table = {tensors, 0, static_cast<int64_t>(tensors.size()), 0, 0, shape, true};
  for (const TensorRecord& t : tensors) {
    table.chunk_count += chunks_of(t, shape);
    table.longest_row = std::max(table.longest_row, t.columns);
    table.all_float32 = table.all_float32 && all_float32(t, state_count);
  }
  table.workspace_size = Layout(table.tensor_count, table.chunk_count).end * 8;
  return table;
}

DeviceTable place_table(const HostTable& table, void* workspace) {
  const Layout layout(table.tensor_count, table.chunk_count);
  uint64_t* words = static_cast<uint64_t*>(workspace);
  return {reinterpret_cast<const TensorRecord*>(words),
          reinterpret_cast<const Chunk*>(words + layout.chunks),
          reinterpret_cast<unsigned*>(words + layout.tickets),
          reinterpret_cast<double*>(words + layout.norms),
          reinterpret_cast<double*>(words + layout.partials),
          table.tensor_count,
          table.chunk_count,
          table.longest_row,
          table.shape,
          table.all_float32};
}

void upload_table(const HostTable& table, void* workspace, const Gpu& gpu) {
  const DeviceTable device = place_table(table, workspace);
  if (table.tensor_count <= Piece<kArguments>::kRecords || !takes_many_arguments(gpu)) {
    upload_pieces<kArguments>(table, device, gpu);
  } else {
    upload_pieces<kManyArguments>(table, device, gpu);
  }
}

}  // namespace singlepass::optim
