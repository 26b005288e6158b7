// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "common/cuda.h"
#include "optim/device_table.h"

namespace singlepass::optim {
namespace {

// Kernel arguments are limited to 4 KiB.
constexpr int kPieceRecords = 3840 / sizeof(TensorRecord);

// Records that travel to the device together, as an argument of one launch.
struct Piece {
  TensorRecord records[kPieceRecords];
};

// The number of a piece's first tensor in the whole table, and of that tensor's first chunk.
struct PieceStart {
  int64_t first_tensor, first_chunk;
};

SINGLEPASS_HD int64_t chunks_of(const TensorRecord& t, const LaunchShape& shape) {
  return chunk_count(t.numel, chunk_size(t, shape.chunk));
}

// A thread block for each record copies it, sets its ticket to zero and lists its chunks. Chunks of earlier records of
// the piece come first.
__global__ void expand_piece(const Piece piece, const PieceStart start, const DeviceTable table) {
  int64_t first = start.first_chunk;
  for (unsigned i = 0; i < blockIdx.x; ++i) first += chunks_of(piece.records[i], table.shape);
  const TensorRecord& record = piece.records[blockIdx.x];
  const int64_t tensor = start.first_tensor + blockIdx.x;
  if (threadIdx.x == 0) {
    const_cast<TensorRecord*>(table.records)[tensor] = record;
    table.tickets[tensor] = 0;
    table.tickets[table.tensor_count] = 0;
  }
  const int64_t count = chunks_of(record, table.shape);
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
    const_cast<Chunk*>(table.chunks)[first + i] = {static_cast<int32_t>(tensor), static_cast<int32_t>(i)};
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
  PieceStart start = {0, 0};
  while (start.first_tensor < table.tensor_count) {
    Piece piece = {};
    const int64_t count = std::min<int64_t>(kPieceRecords, table.tensor_count - start.first_tensor);
    std::copy_n(table.records.begin() + start.first_tensor, count, piece.records);
    launch(&expand_piece, dim3(static_cast<unsigned>(count)), dim3(128), 0, gpu, piece, start, device);
    for (int64_t i = 0; i < count; ++i) start.first_chunk += chunks_of(piece.records[i], table.shape);
    start.first_tensor += count;
  }
}

}  // namespace singlepass::optim
