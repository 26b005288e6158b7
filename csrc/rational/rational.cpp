// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <vector>

#include "common/convert.h"
#include "common/vector.h"
#include "rational/cpu_loops.h"
#include "rational/cpu_sums.h"
#include "rational/dispatch.h"

// Threads take ranges of elements in the order of memory, and go through them by runs that stay in the first-level
// cache. Other storage types than float32 pass through buffers of floats.
namespace singlepass::rational {
namespace {

constexpr int64_t kRun = 1024;
constexpr int64_t kTask = 32768;

// Elements that follow one another in memory: `n` channels from `channel` on where Problem::inner is 1, else `n`
// elements of one channel.
struct Run {
  int64_t element, outer, channel, inner, n;

  int64_t offset(const View& view) const { return outer * view.outer_stride + channel * view.channel_stride + inner; }
};

template <class Body>
void for_each_run(const Problem& p, int64_t begin, int64_t end, const Body& body) {
  const bool rows = p.inner == 1;
  for (int64_t e = begin; e < end;) {
    const int64_t inner = e % p.inner, plane = e / p.inner;
    Run run = {e, plane / p.channels, plane % p.channels, inner, 0};
    run.n = std::min({kRun, end - e, rows ? p.channels - run.channel : p.inner - inner});
    body(run);
    e += run.n;
  }
}

// Calls body(group, first, count) for the parts of a run that share coefficients.
template <class Body>
void for_each_group(const Problem& p, const Run& run, const Body& body) {
  const int64_t size = p.group_size();
  if (p.inner != 1) return body(run.channel / size, int64_t{0}, run.n);
  int64_t group = run.channel / size, end = (group + 1) * size - run.channel;
  for (int64_t i = 0; i < run.n; i = end, end += size, ++group) body(group, i, std::min(run.n, end) - i);
}

SINGLEPASS_TARGET_CLONES void add(const float* a, const float* b, float* to, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) to[i] = a[i] + b[i];
}

SINGLEPASS_TARGET_CLONES void add_scalar(const float* a, float b, float* to, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) to[i] = a[i] + b;
}

SINGLEPASS_TARGET_CLONES void multiply(const float* a, const float* b, float* to, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) to[i] = a[i] * b[i];
}

// Zero where the factor is, whatever stands there.
SINGLEPASS_TARGET_CLONES void keep(const float* a, const float* factor, float* to, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) to[i] = factor[i] == 0.0f ? 0.0f : a[i] * factor[i];
}

SINGLEPASS_TARGET_CLONES float total(const float* a, int64_t n) {
  Vector sum = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum += load_vector(a + i);
  sum += load_part(a + i, n - i);
  float result = 0.0f;
  for (int k = 0; k < kLanes; ++k) result += sum[k];
  return result;
}

template <class S>
S* at(const View& view, const Run& run) {
  return static_cast<S*>(view.data) + run.offset(view);
}

const float* read(const View& view, DType dtype, const Run& run, float* buffer) {
  const char* from = static_cast<const char*>(view.data) + run.offset(view) * size_of(dtype);
  if (dtype == DType::kFloat32) return reinterpret_cast<const float*>(from);
  widen(from, dtype, buffer, run.n);
  return buffer;
}

// Where a run's results go: float32 memory itself, else a buffer that finish() rounds.
struct Writer {
  char* memory;
  DType dtype;
  float* values;
  int64_t n;

  Writer(const View& view, DType dtype, const Run& run, float* buffer)
      : memory(static_cast<char*>(view.data) + run.offset(view) * size_of(dtype)),
        dtype(dtype),
        values(dtype == DType::kFloat32 ? reinterpret_cast<float*>(memory) : buffer),
        n(run.n) {}
  void finish() const {
    if (dtype != DType::kFloat32) narrow(values, memory, dtype, n);
  }
};

// The tables as floats, read once.
template <int M, int N>
struct Tables {
  std::vector<Coefficients<float, M, N>> groups;
  std::vector<float> bias;

  explicit Tables(const Problem& p) {
    for (int64_t k = 0; k < p.groups(); ++k) groups.push_back(coefficients<M, N>(p, k));
    if (p.bias.data == nullptr) return;
    for (int64_t c = 0; c < p.bias.columns; ++c) bias.push_back(table_entry(p.bias, 0, c));
  }
};

// One thread's work on a problem.
template <Form form, int M, int N>
struct Worker {
  const Problem& p;
  const Tables<M, N>& tables;
  const Dropout dropout = p.dropout();
  const bool wide = has_avx512();
  // Whether vectors of bfloat16 go through the loops without a buffer of floats.
  const bool direct = p.dtype == DType::kBFloat16 && form != Form::kD && p.bias.data == nullptr &&
                      p.gate.data == nullptr && dropout.threshold == 0;
  alignas(64) float z_buffer[kRun], y_buffer[kRun], gate_buffer[kRun], factors[kRun], grad_buffer[kRun],
      grad_x_buffer[kRun], grad_gate_buffer[kRun];

  Worker(const Problem& p, const Tables<M, N>& tables) : p(p), tables(tables) {}

  // x + bias.
  const float* input(const Run& run) {
    const float* x = read(p.x, p.dtype, run, z_buffer);
    if (tables.bias.empty()) return x;
    if (p.inner == 1) {
      add(x, &tables.bias[run.channel], z_buffer, run.n);
    } else {
      add_scalar(x, tables.bias[run.channel], z_buffer, run.n);
    }
    return z_buffer;
  }

  void draw_factors(const Run& run) {
    for (int64_t i = 0; i < run.n;) {
      const uint64_t e = static_cast<uint64_t>(run.element + i);
      const Philox4 random = philox4x32(dropout.seed, e / 8, 0);
      for (int lane = static_cast<int>(e % 8); lane < 8 && i < run.n; ++lane, ++i) {
        factors[i] = keep_factor(dropout, random, lane);
      }
    }
  }

  // The rational function of z, by groups.
  template <class S>
  void evaluate(const Run& run, const S* z, S* y) {
    for_each_group(p, run, [&](int64_t group, int64_t first, int64_t count) {
      const Coefficients<float, M, N>& c = tables.groups[group];
      if constexpr (form == Form::kD) {
        for (int64_t i = first; i < first + count; ++i) {
          y[i] = noisy_value(c, z[i], dropout.seed, static_cast<uint64_t>(run.element + i));
        }
      } else if (wide) {
        values_wide<form>(c, z + first, y + first, count);
      } else {
        values_narrow<form>(c, z + first, y + first, count);
      }
    });
  }

  // The gradients of z for those of the function, and of the coefficients, by groups.
  template <class S>
  void differentiate(const Run& run, const S* z, const S* grad, S* grad_z, Partials<M, N>& partials,
                     Totals<M, N>& totals) {
    for_each_group(p, run, [&](int64_t group, int64_t first, int64_t count) {
      const Coefficients<float, M, N>& c = tables.groups[group];
      LaneSums<M, N>& sums = partials.groups[group].sums;
      if constexpr (form == Form::kD) {
        Sums<float, M, N> own = {};
        for (int64_t i = first; i < first + count; ++i) {
          grad_z[i] = noisy_gradients(c, z[i], grad[i], dropout.seed, static_cast<uint64_t>(run.element + i), own);
        }
        for (int i = 0; i <= M; ++i) sums.a[i][0] += own.a[i];
        for (int i = 0; i <= N; ++i) sums.b[i][0] += own.b[i];
      } else if (wide) {
        gradients_wide<form>(c, z + first, grad + first, grad_z + first, count, sums);
      } else {
        gradients_narrow<form>(c, z + first, grad + first, grad_z + first, count, sums);
      }
      partials.added(group, count, totals);
    });
  }

  void forward(const Run& run) {
    if constexpr (form != Form::kD) {
      if (direct) return evaluate(run, at<const BFloat16>(p.x, run), at<BFloat16>(p.y, run));
    }
    const Writer y(p.y, p.dtype, run, y_buffer);
    evaluate(run, input(run), y.values);
    if (dropout.threshold > 0) {
      draw_factors(run);
      keep(y.values, factors, y.values, run.n);
    }
    if (p.gate.data != nullptr) multiply(y.values, read(p.gate, p.dtype, run, gate_buffer), y.values, run.n);
    y.finish();
  }

  void backward(const Run& run, Partials<M, N>& partials, Totals<M, N>& totals) {
    if constexpr (form != Form::kD) {
      if (direct) {
        return differentiate(run, at<const BFloat16>(p.x, run), at<const BFloat16>(p.grad, run),
                             at<BFloat16>(p.grad_x, run), partials, totals);
      }
    }
    const float* z = input(run);
    const float* grad = read(p.grad, p.dtype, run, grad_buffer);
    if (dropout.threshold > 0) {
      draw_factors(run);
      keep(grad, factors, grad_buffer, run.n);
      grad = grad_buffer;
    }
    if (p.gate.data != nullptr) {
      const Writer grad_gate(p.grad_gate, p.dtype, run, grad_gate_buffer);
      evaluate(run, z, y_buffer);
      multiply(grad, y_buffer, grad_gate.values, run.n);
      grad_gate.finish();
      multiply(grad, read(p.gate, p.dtype, run, gate_buffer), grad_buffer, run.n);
      grad = grad_buffer;
    }
    const Writer grad_x(p.grad_x, p.dtype, run, grad_x_buffer);
    differentiate(run, z, grad, grad_x.values, partials, totals);
    if (!tables.bias.empty()) {
      if (p.inner == 1) {
        float* sums = &partials.bias[run.channel];
        add(sums, grad_x.values, sums, run.n);
      } else {
        partials.bias[run.channel] += total(grad_x.values, run.n);
      }
    }
    grad_x.finish();
  }
};

template <Form form, int M, int N>
struct Forward {
  static void run(const Problem& p, const ParallelFor& parallel_for) {
    const Tables<M, N> tables(p);
    const int64_t tasks = (p.numel() + kTask - 1) / kTask;
    parallel_for_elements(parallel_for, tasks, p.numel(), [&](int64_t begin, int64_t end) {
      Worker<form, M, N> worker(p, tables);
      for_each_run(p, begin * kTask, std::min(p.numel(), end * kTask), [&](const Run& run) { worker.forward(run); });
    });
  }
};

// Tasks go to slots, as many as a megabyte of sums allows but at least a few for threads to share: the order of the
// sums is that of the tasks, whatever the number of threads.
constexpr int64_t kSlotBytes = 1 << 20;
constexpr int64_t kFewestSlots = 16;

template <Form form, int M, int N>
struct Backward {
  static void run(const Problem& p, const ParallelFor& parallel_for) {
    const Tables<M, N> tables(p);
    const int64_t tasks = (p.numel() + kTask - 1) / kTask;
    const int64_t slots = std::min(tasks, std::max(kFewestSlots, kSlotBytes / Totals<M, N>::bytes(p)));
    std::vector<Totals<M, N>> totals(slots, Totals<M, N>(p));
    parallel_for_elements(parallel_for, slots, p.numel(), [&](int64_t begin, int64_t end) {
      Worker<form, M, N> worker(p, tables);
      Partials<M, N> partials(p);
      for (int64_t slot = begin; slot < end; ++slot) {
        for (int64_t task = tasks * slot / slots; task < tasks * (slot + 1) / slots; ++task) {
          for_each_run(p, task * kTask, std::min(p.numel(), (task + 1) * kTask),
                       [&](const Run& run) { worker.backward(run, partials, totals[slot]); });
          partials.flush(totals[slot]);
        }
      }
    });
    Totals<M, N> all(p);
    for (const Totals<M, N>& slot : totals) all.add(slot);
    all.store(p);
  }
};

}  // namespace

void forward(const Problem& p, const ParallelFor& parallel_for) {
  if (has_tuned_degrees(p)) {
    dispatch_form<Forward, kTunedNumerator, kTunedDenominator>(p.form, p, parallel_for);
  } else {
    dispatch_form<Forward, kMaxNumerator, kMaxDenominator>(p.form, p, parallel_for);
  }
}

void backward(const Problem& p, const ParallelFor& parallel_for) {
  if (has_tuned_degrees(p)) {
    dispatch_form<Backward, kTunedNumerator, kTunedDenominator>(p.form, p, parallel_for);
  } else {
    dispatch_form<Backward, kMaxNumerator, kMaxDenominator>(p.form, p, parallel_for);
  }
}

}  // namespace singlepass::rational
