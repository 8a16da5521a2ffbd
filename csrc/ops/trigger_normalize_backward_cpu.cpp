// The CPU backend of the backward pass: tiles of the window, through which the samples pass.
#include <cstdlib>
#include <cstring>
#include <memory>

#include "core/check.h"
#include "core/parallel.h"
#include "ops/trigger_normalize_backward_body.h"
#include "ops/trigger_normalize_rows.h"

namespace pybackdoor {

void check_trigger_normalize_backward(const TriggerNormalizeBackwardArgs& args) {
  const TriggerNormalizeArgs& f = args.forward;
  check_trigger_normalize(f);
  PB_CHECK(f.mode == Mode::kPatch || f.mode == Mode::kBlend,
           "trigger_normalize_backward: mode must be patch or blend");
  PB_CHECK(!f.poisoned && !(f.augment && f.noise_p > 0),
           "trigger_normalize_backward: poisoned images and noise have no gradient");
  PB_CHECK(args.slices > 0, "trigger_normalize_backward: slices must be > 0");
  PB_CHECK(f.batch == 0 || f.num_triggers == 1 || (args.order && args.begin),
           "trigger_normalize_backward: order and begin are required with several triggers");
  PB_CHECK(f.batch == 0 || !args.order == !args.begin,
           "trigger_normalize_backward: order and begin go together");
  PB_CHECK(args.pattern_grad || args.mask_grad,
           "trigger_normalize_backward: pattern_grad or mask_grad is required");
  PB_CHECK(!args.mask_grad || f.mask, "trigger_normalize_backward: mask_grad needs a mask");
}

namespace {

constexpr int kTile = 2048;  // window pixels: the 48 KB of a slice's sums stay in L2

// One thread's work: a tile of a trigger's window.
class GradWorker {
 public:
  GradWorker(const TriggerNormalizeBackwardArgs& args, const RowOps& ops,
             const std::vector<SamplePlan>& plans)
      : args_(args), f_(args.forward), ops_(ops), plans_(plans) {}

  // Pixels [first, first + n) of the window, n <= kTile.
  void run(int64_t trigger, int64_t first, int64_t n) {
    std::memset(totals_, 0, sizeof totals_);
    for (int32_t slice = 0; slice < args_.slices; ++slice) {
      const SampleRange range = slice_samples(args_, trigger, slice);
      if (range.begin == range.end) continue;
      std::memset(sums_, 0, sizeof sums_);
      for (int64_t i = range.begin; i < range.end; ++i) {
        const int64_t b = sample_at(args_, i);
        const SamplePlan& plan = plans_[static_cast<size_t>(b)];
        if (!plan.triggered || plan.trigger != trigger) continue;
        if (i + 2 < range.end) prefetch(sample_at(args_, i + 2), first, n);
        add(plan, b, trigger, first, n);
      }
      flush(n);
      for (int k = 0; k < (args_.mask_grad ? 6 : 3); ++k) {
        for (int64_t i = 0; i < n; ++i) totals_[k][i] = add_rn(totals_[k][i], sums_[k][i]);
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      const float sum[3] = {totals_[0][i], totals_[1][i], totals_[2][i]};
      const float moment[3] = {totals_[3][i], totals_[4][i], totals_[5][i]};
      finish_pixel(args_, trigger, first + i, sum, moment);
    }
  }

 private:
  // Fetches the levels of a sample to come: to split them is to wait for them.
  void prefetch(int64_t b, int64_t first, int64_t n) const {
    const SamplePlan& plan = plans_[static_cast<size_t>(b)];
    if (!flat(plan) || f_.input_layout != InputLayout::kNhwc) return;
    const uint8_t* p = f_.images + (b * f_.height * f_.width + plan.y * f_.width + first) * 3;
    for (int64_t at = 0; at < 3 * n; at += 64) __builtin_prefetch(p + at);
  }

  // The window's rows follow each other in the image.
  bool flat(const SamplePlan& plan) const {
    return f_.window_width == f_.width && plan.x == 0 && plan.y >= 0 &&
           plan.y + f_.window_height <= f_.height;
  }

  void add(const SamplePlan& plan, int64_t b, int64_t trigger, int64_t first, int64_t n) {
    if (flat(plan)) {  // the same pixels of the tile each time: these can wait for each other
      segment(plan, b, trigger, first, 0, plan.y * f_.width + first, n);
      if (waiting_ == kTogether) flush(n);
      return;
    }
    flush(n);
    const int64_t w = f_.window_width;
    for (int64_t done = 0; done < n;) {
      const int64_t row = (first + done) / w, col = (first + done) % w;
      const int64_t count = min_of(w - col, n - done), y = plan.y + row;
      const int64_t x0 = max_of(plan.x + col, 0), x1 = min_of(plan.x + col + count, f_.width);
      if (y >= 0 && y < f_.height && x0 < x1) {
        segment(plan, b, trigger, first, done + x0 - plan.x - col, y * f_.width + x0, x1 - x0);
        flush(x1 - x0);
      }
      done += count;
    }
  }

  // Adds the samples that wait, each n pixels, to the sums.
  void flush(int64_t n) {
    for (auto& rows : rows_) ops_.accumulate(rows, waiting_, n);
    waiting_ = 0;
  }

  // n pixels of the image from `pixel` on, which are those of the tile from `at` on: they wait.
  void segment(const SamplePlan& plan, int64_t b, int64_t trigger, int64_t first, int64_t at,
               int64_t pixel, int64_t n) {
    const int64_t plane = f_.height * f_.width;
    const uint8_t* q[3];
    if (f_.input_layout == InputLayout::kNhwc) {
      uint8_t* planes[3];
      for (int c = 0; c < 3; ++c) q[c] = planes[c] = levels_[waiting_][c];
      ops_.split(f_.images + (b * plane + pixel) * 3, planes, n);
    } else {
      for (int c = 0; c < 3; ++c) q[c] = f_.images + (b * 3 + c) * plane + pixel;
    }
    const float* grad[3];
    gradients(plan, b, pixel, n, grad);
    const int64_t area = f_.window_height * f_.window_width, w = first + at;
    for (int c = 0; c < 3; ++c) {
      const int64_t channel = trigger * f_.mask_channels + (f_.mask_channels == 3 ? c : 0);
      rows_[c][waiting_] = {grad[c],
                            q[c],
                            gradient_strength(f_, plan),
                            sums_[c] + at,
                            args_.mask_grad ? sums_[3 + c] + at : nullptr,
                            f_.pattern + (trigger * 3 + c) * area + w,
                            f_.mask ? f_.mask + channel * area + w : nullptr,
                            plan.rule,
                            clips_samples(f_)};
    }
    ++waiting_;
  }

  void gradients(const SamplePlan& plan, int64_t b, int64_t pixel, int64_t n,
                 const float* (&grad)[3]) {
    const int64_t plane = f_.height * f_.width, size = dtype_size(f_.dtype);
    const char* base = static_cast<const char*>(f_.out) + b * 3 * plane * size;
    const bool erase = erases(plan, pixel, n);
    for (int c = 0; c < 3; ++c) grad[c] = values_[waiting_][c];
    if (f_.layout == Layout::kNchw) {
      for (int c = 0; c < 3; ++c) {
        const char* p = base + (c * plane + pixel) * size;
        if (f_.dtype == DType::kFloat32 && !erase) {
          grad[c] = reinterpret_cast<const float*>(p);
        } else {
          ops_.widen(p, f_.dtype, values_[waiting_][c], n);
        }
      }
    } else if (f_.layout == Layout::kChannelsLast) {
      float* planes[3] = {values_[waiting_][0], values_[waiting_][1], values_[waiting_][2]};
      ops_.widen_planes(base + pixel * 3 * size, f_.dtype, planes, n);
    } else {
      const int64_t p = f_.patch_size, per_row = f_.width / p;
      for (int64_t done = 0; done < n;) {
        const int64_t y = (pixel + done) / f_.width, x = (pixel + done) % f_.width;
        const int64_t count = min_of(p - x % p, n - done);
        const int64_t at = (y / p * per_row + x / p) * 3 * p * p + y % p * p + x % p;
        for (int c = 0; c < 3; ++c) {
          ops_.widen(base + (at + c * p * p) * size, f_.dtype, values_[waiting_][c] + done, count);
        }
        done += count;
      }
    }
    if (!erase) return;
    for_erased(plan, pixel, n, [&](int64_t from, int64_t count) {
      for (auto& values : values_[waiting_])
        std::memset(values + from, 0, static_cast<size_t>(count) * 4);
    });
  }

  // Applies f(from, count) to the erased parts of n pixels from `pixel` on.
  template <typename F>
  void for_erased(const SamplePlan& plan, int64_t pixel, int64_t n, F f) const {
    const int64_t last = pixel + n - 1, side = plan.erase_side;
    const int64_t y0 = max_of(plan.erase_y, pixel / f_.width);
    const int64_t y1 = min_of(plan.erase_y + side - 1, last / f_.width);
    for (int64_t y = y0; y <= y1; ++y) {
      const int64_t from = max_of(y * f_.width + plan.erase_x, pixel);
      const int64_t to = min_of(y * f_.width + plan.erase_x + side, last + 1);
      if (from < to) f(from - pixel, to - from);
    }
  }

  bool erases(const SamplePlan& plan, int64_t pixel, int64_t n) const {
    bool erase = false;
    for_erased(plan, pixel, n, [&](int64_t, int64_t) { erase = true; });
    return erase;
  }

  const TriggerNormalizeBackwardArgs& args_;
  const TriggerNormalizeArgs& f_;
  const RowOps& ops_;
  const std::vector<SamplePlan>& plans_;
  alignas(64) float sums_[6][kTile];    // of one slice: sum, moment of each channel
  alignas(64) float totals_[6][kTile];  // of the slices before
  int waiting_ = 0;
  GradRow rows_[3][kTogether];
  alignas(64) float values_[kTogether][3][kTile];
  alignas(64) uint8_t levels_[kTogether][3][kTile];
};

template <DType dtype, bool clip>
void run_lanes(const TriggerNormalizeBackwardArgs& args, const std::vector<SamplePlan>& plans,
               int lanes) {
  const TriggerNormalizeArgs& f = args.forward;
  const int64_t area = f.window_height * f.window_width, fours = (area + kFour - 1) / kFour;
  for (int64_t trigger = 0; trigger < f.num_triggers; ++trigger) {
    for (int32_t slice = 0; slice < args.slices; ++slice) {
      const SampleRange range = slice_samples(args, trigger, slice);
      for (int lane = 0; lane < lanes; ++lane) {
        for (int64_t index = lane; index < fours; index += lanes) {
          const WindowFour four = window_four(f, index);
          GradSums sums = {};
          for (int64_t i = range.begin; i < range.end; ++i) {
            const int64_t b = sample_at(args, i);
            const SamplePlan& plan = plans[static_cast<size_t>(b)];
            if (!plan.triggered || plan.trigger != trigger) continue;
            add_sample<dtype, clip>(f, plan, b, four, &sums);
          }
          store_partial(args, trigger, slice, four, sums);
        }
      }
    }
    for (int64_t at = 0; at < area; ++at) reduce_pixel(args, trigger, at);
  }
}

template <DType dtype>
void run_lanes(const TriggerNormalizeBackwardArgs& args, const std::vector<SamplePlan>& plans,
               int lanes) {
  if (clips_samples(args.forward)) return run_lanes<dtype, true>(args, plans, lanes);
  run_lanes<dtype, false>(args, plans, lanes);
}

// The bodies shared with CUDA, as n lanes: a test driver.
void run_lanes(TriggerNormalizeBackwardArgs args, const std::vector<SamplePlan>& plans, int lanes) {
  const TriggerNormalizeArgs& f = args.forward;
  const int64_t area = f.window_height * f.window_width;
  std::vector<float> partial(
      static_cast<size_t>(f.num_triggers * args.slices * partial_kinds(args) * 3 * area));
  args.partial = partial.data();
  if (f.dtype == DType::kFloat32) return run_lanes<DType::kFloat32>(args, plans, lanes);
  if (f.dtype == DType::kFloat16) return run_lanes<DType::kFloat16>(args, plans, lanes);
  run_lanes<DType::kBFloat16>(args, plans, lanes);
}

}  // namespace

std::string trigger_normalize_backward_cpu(const TriggerNormalizeBackwardArgs& args,
                                           const std::string& isa, int threads) {
  check_trigger_normalize_backward(args);
  const TriggerNormalizeArgs& f = args.forward;
  std::vector<SamplePlan> plans(static_cast<size_t>(f.batch));
  for (int64_t b = 0; b < f.batch; ++b) plans[static_cast<size_t>(b)] = sample_plan(f, b);
  if (isa.rfind("lanes", 0) == 0) {
    const int lanes = std::atoi(isa.c_str() + 5);
    PB_CHECK(lanes > 0, "trigger_normalize_backward: lanes<n> needs n > 0, got " + isa);
    run_lanes(args, plans, lanes);
    return isa;
  }
  const RowOps& ops = find_rows(isa);
  const int64_t area = f.window_height * f.window_width, tiles = (area + kTile - 1) / kTile;
  parallel_for(f.num_triggers * tiles, 1, threads, [&](int64_t begin, int64_t end) {
    const auto worker = std::make_unique<GradWorker>(args, ops, plans);  // 220 KB
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item % tiles * kTile;
      worker->run(item / tiles, first, min_of(kTile, area - first));
    }
  });
  return ops.name;
}

}  // namespace pybackdoor
