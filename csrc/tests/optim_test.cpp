// SPDX-License-Identifier: Apache-2.0
// The CUDA engine on the CPU, under permuted schedules and odd launch shapes, against the C++ engine: the same bits.
// tests/simt/ judges the mathematics of both against NumPy in float64.
#include <cmath>
#include <cstring>
#include <deque>
#include <string>
#include <vector>

#include "check.h"
#include "common/cuda.h"
#include "optim/grad_norm.h"
#include "optim/rules.h"
#include "optim/step.h"
#include "simt/simt_memory.h"

namespace {

using namespace singlepass;
using namespace singlepass::optim;

const ParallelFor kSerial([](std::int64_t n, std::int64_t, const ParallelFor::Body& body) { body(0, n); }, 1);
const Gpu kGpu = {"optim_test", nullptr, nullptr, nullptr};

template <class Rule>
typename Rule::Hyper hyper();
template <>
AdamW<false>::Hyper hyper<AdamW<false>>() {
  return {0.9, 0.999, 1e-8, 0.1};
}
template <>
AdamW<true>::Hyper hyper<AdamW<true>>() {
  return {0.9, 0.999, 1e-8, 0.1};
}
template <>
Lion::Hyper hyper<Lion>() {
  return {0.9, 0.99, 0.1};
}
template <>
AdaBelief<false>::Hyper hyper<AdaBelief<false>>() {
  return {0.9, 0.999, 1e-16, 0.1, true, false, true, true};
}
template <>
AdaBelief<true>::Hyper hyper<AdaBelief<true>>() {
  return {0.9, 0.999, 1e-16, 0.1, false, false, false, true};
}
template <>
Adan::Hyper hyper<Adan>() {
  return {0.98, 0.92, 0.99, 1e-8, 0.1, false};
}
template <>
DiffGrad::Hyper hyper<DiffGrad>() {
  return {0.9, 0.999, 1e-8, 0.1};
}
template <>
Lamb::Hyper hyper<Lamb>() {
  return {0.9, 0.999, 1e-6, 0.1, true};
}
template <>
Lars::Hyper hyper<Lars>() {
  return {0.9, 0.1, 1e-3, 0.0};
}
template <>
SgdSaI::Hyper hyper<SgdSaI>() {
  return {0.9, 0.1};
}

// Tensors of given sizes and dtypes in guarded memory, filled from a counter.
class Tensors {
 public:
  Tensors(std::vector<std::int64_t> sizes, int states, DType param, DType grad, DType state, std::size_t misaligned) {
    for (const std::int64_t numel : sizes) {
      TensorRecord record = {};
      record.param = fill(numel, param, misaligned, 1.0f);
      record.grad = fill(numel, grad, 0, 0.1f);
      for (int k = 0; k < states; ++k) {
        record.state[k] = fill(numel, state, misaligned, 0.0f);
        record.state_dtype[k] = state;
      }
      record.step = static_cast<float*>(fill(1, DType::kFloat32, 0, 0.0f));
      float* scale = static_cast<float*>(fill(1, DType::kFloat32, 0, 0.0f));
      *scale = 1.5f;
      record.scale = scale;
      record.numel = numel;
      record.id = static_cast<std::uint32_t>(records.size());
      record.param_dtype = param;
      record.grad_dtype = grad;
      records.push_back(record);
    }
  }

  bool intact() const {
    bool intact = true;
    for (const auto& memory : memory_) intact &= memory.intact();
    return intact;
  }

  std::string bytes() const {
    std::string all;
    for (const auto& memory : memory_) all.append(reinterpret_cast<const char*>(memory.data()), memory.bytes());
    return all;
  }

  // Where the two lists first differ; empty if nowhere.
  static std::string difference(const Tensors& a, const Tensors& b) {
    const std::size_t per_tensor = a.memory_.size() / a.records.size();
    for (std::size_t m = 0; m < a.memory_.size(); ++m)
      for (std::size_t i = 0; i < a.memory_[m].bytes(); ++i)
        if (a.memory_[m].data()[i] != b.memory_[m].data()[i])
          return "tensor " + std::to_string(m / per_tensor) + ", array " + std::to_string(m % per_tensor) + ", byte " +
                 std::to_string(i);
    return "";
  }

  std::vector<TensorRecord> records;

 private:
  void* fill(std::int64_t numel, DType dtype, std::size_t misaligned, float scale) {
    const auto size = static_cast<std::size_t>(size_of(dtype));
    auto& memory = memory_.emplace_back(static_cast<std::size_t>(numel) * size, misaligned * size);
    for (std::int64_t i = 0; i < numel; ++i) {
      const float value = scale * std::sin(static_cast<float>(memory_.size() * 131 + static_cast<std::size_t>(i)));
      if (dtype == DType::kFloat32) {
        std::memcpy(memory.data() + 4 * i, &value, 4);
      } else {
        const std::uint16_t half = dtype == DType::kBFloat16 ? float_to_bfloat16(value) : float_to_float16(value);
        std::memcpy(memory.data() + 2 * i, &half, 2);
      }
    }
    return memory.data();
  }

  std::deque<simt::GuardedMemory> memory_;
};

StepOptions options_for(bool stochastic_rounding) {
  StepOptions options = {};
  options.lr = {0.01, nullptr};
  options.seed = 42;
  options.stochastic_rounding = stochastic_rounding;
  return options;
}

template <class Rule>
void run_cpu(Tensors& tensors, const StepOptions& options, int steps) {
  for (int i = 0; i < steps; ++i) step<Rule>(tensors.records, hyper<Rule>(), options, kSerial);
}

// The table is uploaded once for all steps.
template <class Rule>
void run_simt(Tensors& tensors, const StepOptions& options, int steps, LaunchShape shape) {
  const HostTable host = make_table(tensors.records, Rule::kStates, shape);
  simt::GuardedMemory workspace(static_cast<std::size_t>(host.workspace_size));
  upload_table(host, workspace.data(), kGpu);
  const DeviceTable table = place_table(host, workspace.data());
  for (int i = 0; i < steps; ++i) step<Rule>(table, hyper<Rule>(), options, kGpu);
  CHECK(workspace.intact());
}

template <class Rule>
void check_same_bits(DType param, DType grad, DType state, std::size_t misaligned, LaunchShape shape) {
  const std::vector<std::int64_t> sizes = {0, 1, 2, 7, 8, 9, 255, 1000, 2049};
  const StepOptions options = options_for(param == DType::kBFloat16);
  Tensors cpu(sizes, Rule::kStates, param, grad, state, misaligned);
  Tensors simt(sizes, Rule::kStates, param, grad, state, misaligned);
  const std::string before = cpu.bytes();
  run_cpu<Rule>(cpu, options, 3);
  run_simt<Rule>(simt, options, 3, shape);
  CHECK(cpu.intact() && simt.intact());
  CHECK(cpu.bytes() != before);
  CHECK_EQUAL(std::string(Rule::kName) + Tensors::difference(cpu, simt), std::string(Rule::kName));
}

template <class Rule>
void check_rule() {
  constexpr DType kF32 = DType::kFloat32, kBF16 = DType::kBFloat16, kF16 = DType::kFloat16;
  simt::set_seed(1);
  check_same_bits<Rule>(kF32, kF32, kF32, 0, {256, 16384});
  check_same_bits<Rule>(kF32, kF32, kF32, 1, {256, 512});
  check_same_bits<Rule>(kBF16, kBF16, kF32, 0, {32, 8});
  check_same_bits<Rule>(kBF16, kF32, kBF16, 3, {64, 1000});
  check_same_bits<Rule>(kF16, kF16, kF32, 0, {128, 104});
}

TEST(both_engines_give_the_same_bits) {
#define SINGLEPASS_CHECK_RULE(...) check_rule<__VA_ARGS__>();
  SINGLEPASS_FOR_EACH_RULE(SINGLEPASS_CHECK_RULE)
}

// Whichever block comes last counts the step that all blocks draw their random numbers from.
TEST(no_schedule_changes_a_bit) {
  Tensors cpu({600, 600}, 2, DType::kBFloat16, DType::kFloat32, DType::kFloat32, 0);
  run_cpu<AdamW<false>>(cpu, options_for(true), 2);
  for (std::uint64_t seed = 0; seed < 30; ++seed) {
    Tensors simt({600, 600}, 2, DType::kBFloat16, DType::kFloat32, DType::kFloat32, 0);
    simt::set_seed(seed);
    run_simt<AdamW<false>>(simt, options_for(true), 2, {64, 256});
    CHECK_EQUAL(std::to_string(seed) + Tensors::difference(cpu, simt), std::to_string(seed));
  }
}

TEST(a_step_over_300_tensors_is_one_launch_or_two_with_norms) {
  const auto launches = []<class Rule>(Rule) {
    Tensors tensors(std::vector<std::int64_t>(300, 33), Rule::kStates, DType::kFloat32, DType::kFloat32,
                    DType::kFloat32, 0);
    const HostTable host = make_table(tensors.records, Rule::kStates);
    simt::GuardedMemory workspace(static_cast<std::size_t>(host.workspace_size));
    upload_table(host, workspace.data(), kGpu);
    const std::uint64_t before = simt::launches();
    step<Rule>(place_table(host, workspace.data()), hyper<Rule>(), options_for(false), kGpu);
    return simt::launches() - before;
  };
  CHECK_EQUAL(launches(AdamW<false>{}), 1u);
  CHECK_EQUAL(launches(Adan{}), 1u);
  CHECK_EQUAL(launches(Lamb{}), 2u);
  CHECK_EQUAL(launches(Lars{}), 2u);
}

// Sizes differ, so that chunks of the second piece come where those of the first end.
TEST(a_table_of_300_tensors_is_one_upload_where_the_driver_takes_many_arguments) {
  std::vector<std::int64_t> sizes(300);
  for (std::size_t i = 0; i < sizes.size(); ++i) sizes[i] = static_cast<std::int64_t>(i % 7 * 40);
  Tensors cpu(sizes, Lion::kStates, DType::kFloat32, DType::kFloat32, DType::kFloat32, 0);
  run_cpu<Lion>(cpu, options_for(false), 1);
  const auto uploads = [&](int driver) {
    simt::device().driver = driver;
    Tensors simt(sizes, Lion::kStates, DType::kFloat32, DType::kFloat32, DType::kFloat32, 0);
    const std::uint64_t before = simt::launches();
    run_simt<Lion>(simt, options_for(false), 1, {32, 64});
    CHECK_EQUAL(Tensors::difference(cpu, simt), std::string());
    return simt::launches() - before - 1;
  };
  CHECK_EQUAL(uploads(12000), 9u);
  CHECK_EQUAL(uploads(12010), 1u);
}

// A tensor has two chunks here.
TEST(waves_keep_all_threads_busy) {
  Tensors tensors(std::vector<std::int64_t>(64, 1 << 16), Lamb::kStates, DType::kFloat32, DType::kFloat32,
                  DType::kFloat32, 0);
  for (const std::int64_t threads : {1, 2, 8, 32}) {
    std::int64_t fewest = 128;
    const auto run = [&](std::int64_t n, std::int64_t, const ParallelFor::Body& body) {
      fewest = std::min(fewest, n);
      body(0, n);
    };
    step<Lamb>(tensors.records, hyper<Lamb>(), {}, ParallelFor(run, threads));
    CHECK_EQUAL(fewest, std::min<std::int64_t>(std::max<std::int64_t>(8 * threads, 16), 128));
  }
}

TEST(a_step_with_found_inf_changes_nothing_its_counter_included) {
  const float found_inf = 1.0f;
  StepOptions options = options_for(false);
  options.found_inf = &found_inf;
  Tensors tensors({1, 100, 3000}, Lamb::kStates, DType::kFloat32, DType::kFloat32, DType::kFloat32, 0);
  const std::string before = tensors.bytes();
  run_simt<Lamb>(tensors, options, 2, {});
  run_cpu<Lamb>(tensors, options, 2);
  CHECK(tensors.bytes() == before);
}

TEST(gradient_norms_agree) {
  Tensors tensors({0, 1, 9, 5000, 40000}, 0, DType::kFloat32, DType::kFloat16, DType::kFloat32, 0);
  const ClipOptions options = {1.0, 1e-6, nullptr};
  GradNorm cpu = {};
  grad_norm(tensors.records, options, &cpu, kSerial);
  CHECK(cpu.norm > 1.0f);
  // The second shape leaves 44 partial sums to each thread of the last block.
  for (const LaunchShape shape : {LaunchShape{128, 1024}, LaunchShape{32, 32}}) {
    const HostTable host = make_table(tensors.records, 0, shape);
    simt::GuardedMemory workspace(static_cast<std::size_t>(host.workspace_size));
    upload_table(host, workspace.data(), kGpu);
    const DeviceTable table = place_table(host, workspace.data());
    for (std::uint64_t seed = 0; seed < 5; ++seed) {
      GradNorm norm = {};
      simt::set_seed(seed);
      grad_norm(table, options, &norm, kGpu);
      CHECK_EQUAL(norm.norm, cpu.norm);
      CHECK_EQUAL(norm.divisor, cpu.divisor);
      CHECK_EQUAL(norm.found_inf, 0.0f);
    }
  }
}

}  // namespace

TEST_MAIN()
