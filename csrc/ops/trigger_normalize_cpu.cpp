// The CPU backend: cuts the images into runs, drives the row kernels; and the lanes test driver.
#include <atomic>
#include <cstdlib>

#include "core/check.h"
#include "core/cpu_isa.h"
#include "core/parallel.h"
#include "ops/trigger_normalize_rows.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pybackdoor {

void check_trigger_normalize(const TriggerNormalizeArgs& a) {
  PB_CHECK(a.batch >= 0, "trigger_normalize: batch must be >= 0");
  PB_CHECK(a.height > 0 && a.width > 0, "trigger_normalize: height and width must be > 0");
  PB_CHECK(a.height * a.width < int64_t{1} << 29,
           "trigger_normalize: images must be < 2^29 pixels");
  const auto known = [](auto code, int last) {
    return static_cast<int>(code) >= 0 && static_cast<int>(code) <= last;
  };
  PB_CHECK(known(a.mode, 3), "trigger_normalize: unknown mode");
  PB_CHECK(known(a.input_layout, 1), "trigger_normalize: unknown input_layout");
  PB_CHECK(known(a.layout, 2), "trigger_normalize: unknown layout");
  PB_CHECK(known(a.dtype, 2), "trigger_normalize: unknown dtype");
  PB_CHECK(a.batch == 0 || (a.images && a.out), "trigger_normalize: images and out are required");
  PB_CHECK(a.layout != Layout::kPatchified ||
               (a.patch_size > 0 && a.height % a.patch_size == 0 && a.width % a.patch_size == 0),
           "trigger_normalize: patch_size must divide height and width");
  PB_CHECK(!a.augment || a.batch == 0 || a.sample_id,
           "trigger_normalize: sample_id is required with augment");
  PB_CHECK(a.quantize || (!a.poisoned && !(a.augment && a.noise_p > 0)),
           "trigger_normalize: without quantisation there are no poisoned images and no noise");
  if (a.mode == Mode::kNone) return;
  PB_CHECK(a.num_triggers > 0, "trigger_normalize: num_triggers must be > 0");
  if (a.mode == Mode::kWarp) {
    PB_CHECK(a.grid, "trigger_normalize: grid is required in mode warp");
    PB_CHECK(a.quantize, "trigger_normalize: mode warp always quantises");
    return;
  }
  PB_CHECK(a.pattern, "trigger_normalize: pattern is required in modes patch and blend");
  PB_CHECK(a.window_height > 0 && a.window_width > 0 && a.window_height <= a.height &&
               a.window_width <= a.width,
           "trigger_normalize: the window must fit into the image");
  PB_CHECK(!a.mask || a.mask_channels == 1 || a.mask_channels == 3,
           "trigger_normalize: mask must have 1 or 3 channels");
}

const RowOps& portable_rows() {
  static constexpr RowOps ops = PB_GENERIC_ROWS("portable");
  return ops;
}

namespace {

// Outputs beyond this go past the caches: they would only push the triggers out of L2.
constexpr int64_t kStreamBytes = int64_t{4} << 20;

std::vector<const RowOps*> usable_rows() {
  std::vector<const RowOps*> rows;
#if defined(__x86_64__)
  if (has_avx512()) rows.push_back(&avx512_rows());
  if (has_avx2()) rows.push_back(&avx2_rows());
#endif
  rows.push_back(&portable_rows());
  return rows;
}

LevelTable make_table(const TriggerNormalizeArgs& args) {
  LevelTable table = {};
  for (int c = 0; c < 3; ++c) {
    for (uint32_t x = 0; x < 256; ++x) {
      const float v = normalize_value(level_value(x), args.mean[c], args.std[c]);
      table.value[c][x] = v;
      uint32_t bits = float_bits(v);
      if (args.dtype != DType::kFloat32) {
        bits = args.dtype == DType::kFloat16 ? to_float16(v) : to_bfloat16(v);
        table.half[c][x] = static_cast<uint16_t>(bits);
      }
      for (int k = 0; k < 4; ++k) table.bytes[c][k][x] = static_cast<uint8_t>(bits >> (8 * k));
    }
  }
  return table;
}

// One thread's work: runs of pixels, their levels in three planes.
class Worker {
 public:
  Worker(const TriggerNormalizeArgs& args, const RowOps& ops, const LevelTable& table, bool stream)
      : args_(args), ops_(ops), table_(table), stream_(stream) {}

  // Fetches the levels of the next run while this one is computed: the phases of a run do not
  // overlap by themselves. Non-temporal, as images read once would push the trigger out of L2.
  void prefetch(int64_t b, int64_t first) const {
    const int64_t plane = args_.height * args_.width, n = min_of(kRun, plane - first);
    const bool nhwc = args_.input_layout == InputLayout::kNhwc;
    const uint8_t* p = args_.images + b * 3 * plane + first * (nhwc ? 3 : 1);
    for (int64_t k = 0; k < 3 * n; k += 64) {
      __builtin_prefetch(nhwc ? p + k : p + k / n * plane + k % n, 0, 0);
    }
  }

  // Pixels [first, first + n) of image b, n <= kRun.
  void run(const SamplePlan& plan, int64_t b, int64_t first, int64_t n) {
    const int64_t plane = args_.height * args_.width;
    const bool nhwc = args_.input_layout == InputLayout::kNhwc;
    const uint8_t* image = args_.images + b * 3 * plane;
    uint8_t* q[3] = {levels_[0], levels_[1], levels_[2]};
    if (plan.triggered && args_.mode == Mode::kWarp) {
      const float* grid = args_.grid + (plan.trigger * plane + first) * 2;
      ops_.warp(WarpRow{image, nhwc ? 3 : 1, nhwc ? 1 : plane, args_.height, args_.width, grid,
                        args_.clip},
                q, n);
    } else {
      if (nhwc) {
        ops_.split(image + first * 3, q, n);
      } else {
        for (int c = 0; c < 3; ++c) std::memcpy(q[c], image + c * plane + first, n);
      }
      if (fused(plan, first, n)) return blend_and_write(plan, b, first, n);
      if (plan.triggered && args_.quantize) window(plan, first, n);
    }
    if (args_.poisoned) {
      uint8_t* poisoned = args_.poisoned + b * 3 * plane;
      if (nhwc) {
        ops_.join(q, poisoned + first * 3, n);
      } else {
        for (int c = 0; c < 3; ++c) std::memcpy(poisoned + c * plane + first, q[c], n);
      }
    }
    write(plan, b, first, n);
  }

 private:
  // Applies f(row, x0, x1) to the pixels of the run inside a rectangle.
  template <typename F>
  void for_rows(int64_t first, int64_t n, int64_t y, int64_t x, int64_t h, int64_t w, F f) {
    const int64_t last = first + n - 1;
    const int64_t y0 = max_of(y, first / args_.width), y1 = min_of(y + h - 1, last / args_.width);
    for (int64_t row = y0; row <= y1; ++row) {
      const int64_t x0 = max_of(max_of(x, 0), first - row * args_.width);
      const int64_t x1 = min_of(min_of(x + w, args_.width), last + 1 - row * args_.width);
      if (x0 < x1) f(row, x0, x1);
    }
  }

  // Applies f(index in the window, pixel, count) to the window's part of the run.
  template <typename F>
  void for_window(const SamplePlan& plan, int64_t first, int64_t n, F f) {
    if (whole(plan)) return f(first, first, n);
    for_rows(first, n, plan.y, plan.x, args_.window_height, args_.window_width,
             [&](int64_t row, int64_t x0, int64_t x1) {
               const int64_t at = (row - plan.y) * args_.window_width + x0 - plan.x;
               f(at, row * args_.width + x0, x1 - x0);
             });
  }

  bool erases(const SamplePlan& plan, int64_t first, int64_t n) {
    bool erase = false;
    for_rows(first, n, plan.erase_y, plan.erase_x, plan.erase_side, plan.erase_side,
             [&](int64_t, int64_t, int64_t) { erase = true; });
    return erase;
  }

  bool whole(const SamplePlan& plan) const {
    return args_.window_height == args_.height && args_.window_width == args_.width &&
           plan.y == 0 && plan.x == 0;
  }

  // The commonest case, where no step needs the blended levels but the lookup.
  bool fused(const SamplePlan& plan, int64_t first, int64_t n) {
    return ops_.blend_lookup && plan.triggered && args_.mode == Mode::kBlend && !args_.mask &&
           args_.quantize && !args_.nonzero_only && !args_.poisoned && !plan.noisy &&
           args_.layout == Layout::kNchw && whole(plan) && !erases(plan, first, n);
  }

  void blend_and_write(const SamplePlan& plan, int64_t b, int64_t first, int64_t n) {
    const int64_t plane = args_.height * args_.width, size = dtype_size(args_.dtype);
    for (int c = 0; c < 3; ++c) {
      char* p = static_cast<char*>(args_.out) + ((b * 3 + c) * plane + first) * size;
      const float* t = args_.pattern + (int64_t{plan.trigger} * 3 + c) * plane + first;
      const bool aligned = (reinterpret_cast<uintptr_t>(p) & 63) == 0;
      ops_.blend_lookup(t, levels_[c], n, plan.rule, table_, c, args_.dtype, p, stream_ && aligned);
    }
  }

  void window(const SamplePlan& plan, int64_t first, int64_t n) {
    const int64_t area = args_.window_height * args_.window_width;
    const float* pattern = args_.pattern + int64_t{plan.trigger} * 3 * area;
    const float* mask =
        args_.mask ? args_.mask + int64_t{plan.trigger} * args_.mask_channels * area : nullptr;
    for_window(plan, first, n, [&](int64_t at, int64_t pixel, int64_t count) {
      for (int c = 0; c < 3; ++c) {
        const float* t = pattern + c * area + at;
        uint8_t* q = levels_[c] + (pixel - first);
        if (args_.mode == Mode::kPatch) {
          ops_.patch(t, q, count, args_.clip);
        } else {
          const int64_t channel = args_.mask_channels == 3 ? c : 0;
          ops_.blend(t, mask ? mask + channel * area + at : nullptr, q, count, plan.rule);
        }
      }
    });
  }

  // The unquantised, normalised values of channel c over what `write` has put into `values`.
  void window_floats(const SamplePlan& plan, int64_t first, int64_t n, int c, char* values) {
    const int64_t area = args_.window_height * args_.window_width, size = dtype_size(args_.dtype);
    const float* t = args_.pattern + (int64_t{plan.trigger} * 3 + c) * area;
    const int64_t channel =
        int64_t{plan.trigger} * args_.mask_channels + (args_.mask_channels == 3 ? c : 0);
    const float* m = args_.mask ? args_.mask + channel * area : nullptr;
    for_window(plan, first, n, [&](int64_t at, int64_t pixel, int64_t count) {
      const FloatRow row = {args_.mode,    t + at,       m ? m + at : nullptr, plan.rule,
                            args_.mean[c], args_.std[c], args_.dtype};
      ops_.window_floats(row, levels_[c] + (pixel - first), values + (pixel - first) * size, count);
    });
  }

  void write(const SamplePlan& plan, int64_t b, int64_t first, int64_t n) {
    const int64_t plane = args_.height * args_.width, size = dtype_size(args_.dtype);
    char* out = static_cast<char*>(args_.out) + b * 3 * plane * size;
    const bool erase = erases(plan, first, n);
    const bool direct = args_.layout == Layout::kNchw && !erase;
    for (int c = 0; c < 3; ++c) {
      char* p = direct ? out + (c * plane + first) * size : values_[c];
      if (plan.noisy) {
        const uint32_t blocks = static_cast<uint32_t>((plane + 3) / 4);
        const uint32_t block = static_cast<uint32_t>(c) * blocks + static_cast<uint32_t>(first / 4);
        ops_.noise(
            NoiseRow{args_.seed, block, kStreamNoise | args_.view << 8, plan.id_low, plan.id_high,
                     args_.noise_std, args_.mean[c], args_.std[c], args_.half_noise, args_.dtype},
            levels_[c], p, n);
      } else {
        const bool aligned = (reinterpret_cast<uintptr_t>(p) & 63) == 0;
        const bool floats = plan.triggered && !args_.quantize;
        if (!floats || !whole(plan)) {
          const bool past = direct && stream_ && aligned && !floats;
          ops_.lookup(table_, c, args_.dtype, levels_[c], p, n, past);
        }
        if (floats) window_floats(plan, first, n, c, p);
      }
    }
    if (direct) return;
    if (erase) {
      for_rows(first, n, plan.erase_y, plan.erase_x, plan.erase_side, plan.erase_side,
               [&](int64_t row, int64_t x0, int64_t x1) {
                 const int64_t at = row * args_.width + x0 - first;
                 for (auto& value : values_) std::memset(value + at * size, 0, (x1 - x0) * size);
               });
    }
    if (args_.layout == Layout::kNchw) {
      for (int c = 0; c < 3; ++c) {
        std::memcpy(out + (c * plane + first) * size, values_[c], n * size);
      }
    } else if (args_.layout == Layout::kChannelsLast) {
      const void* planes[3] = {values_[0], values_[1], values_[2]};
      ops_.interleave(planes, out + first * 3 * size, n, size);
    } else {
      write_patches(out, first, n, size);
    }
  }

  void write_patches(char* out, int64_t first, int64_t n, int64_t size) {
    const int64_t p = args_.patch_size, per_row = args_.width / p;
    for (int64_t done = 0; done < n;) {
      const int64_t y = (first + done) / args_.width, x = (first + done) % args_.width;
      const int64_t count = min_of(p - x % p, n - done);
      const int64_t at = (y / p * per_row + x / p) * 3 * p * p + y % p * p + x % p;
      for (int c = 0; c < 3; ++c) {
        std::memcpy(out + (at + c * p * p) * size, values_[c] + done * size, count * size);
      }
      done += count;
    }
  }

  const TriggerNormalizeArgs& args_;
  const RowOps& ops_;
  const LevelTable& table_;
  const bool stream_;
  alignas(64) uint8_t levels_[3][kRun];
  alignas(64) char values_[3][kRun * 4];  // elements of the output's dtype
};

template <DType dtype>
void run_lanes(const TriggerNormalizeArgs& args, const float* table, int lanes) {
  for (int64_t b = 0; b < args.batch; ++b) {
    const SamplePlan plan = sample_plan(args, b);
    for (int lane = 0; lane < lanes; ++lane) {
      if (args.quantize) {
        trigger_normalize_body<dtype, true>(args, plan, table, b, lane, lanes);
      } else {
        trigger_normalize_body<dtype, false>(args, plan, table, b, lane, lanes);
      }
    }
  }
}

void run_lanes(const TriggerNormalizeArgs& args, const float* table, int lanes) {
  if (args.dtype == DType::kFloat32) return run_lanes<DType::kFloat32>(args, table, lanes);
  if (args.dtype == DType::kFloat16) return run_lanes<DType::kFloat16>(args, table, lanes);
  run_lanes<DType::kBFloat16>(args, table, lanes);
}

}  // namespace

const RowOps& find_rows(const std::string& isa) {
  for (const RowOps* rows : usable_rows()) {
    if (isa == "auto" || isa == rows->name) return *rows;
  }
  throw std::invalid_argument("trigger_normalize: instruction set " + isa +
                              " is not usable on this machine");
}

std::string trigger_normalize_cpu(const TriggerNormalizeArgs& args, const std::string& isa,
                                  int threads) {
  check_trigger_normalize(args);
  const LevelTable table = make_table(args);
  if (isa.rfind("lanes", 0) == 0) {
    const int lanes = std::atoi(isa.c_str() + 5);
    PB_CHECK(lanes > 0, "trigger_normalize: lanes<n> needs n > 0, got " + isa);
    run_lanes(args, table.value[0], lanes);
    return isa;
  }
  const RowOps* ops = &find_rows(isa);
  const int64_t pixels = args.height * args.width, runs = (pixels + kRun - 1) / kRun;
  const bool stream = args.batch * 3 * pixels * dtype_size(args.dtype) > kStreamBytes;
  constexpr int64_t kGrain = 8;  // runs, 16k pixels: some 10 us, a few times a fork
  parallel_for(args.batch * runs, kGrain, threads, [&](int64_t begin, int64_t end) {
    Worker worker(args, *ops, table, stream);
    SamplePlan plan = {};
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / runs, first = item % runs * kRun;
      if (item == begin || first == 0) plan = sample_plan(args, b);
      if (item + 1 < end) worker.prefetch((item + 1) / runs, (item + 1) % runs * kRun);
      worker.run(plan, b, first, min_of(kRun, pixels - first));
    }
#if defined(__x86_64__)
    if (stream) _mm_sfence();
#endif
  });
  return ops->name;
}

}  // namespace pybackdoor
